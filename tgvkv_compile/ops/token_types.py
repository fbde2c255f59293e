"""Which token is what: padding, vision, question.

Counts are prefix sums in float32, exact below `2 ** 24` tokens: the same functions stand in exported graphs, and TensorRT's
CumSum takes floats only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig


class TokenTypes(NamedTuple):
    """What each token of a padded batch is.

    Attributes:
        valid: `[B, N]` bool, the token is not padding.
        vision: `[B, N]` bool, a subset of `valid`: an image or video placeholder.
        question: `[B, N]` bool, the set `R` of the paper: the text after the last vision token.
        positions: `[B, N]` int64, position among the valid tokens of the sample; -1 at padding.
        lengths: `[B]` int64, valid tokens: the `N` of the sample.
    """

    valid: Tensor
    vision: Tensor
    question: Tensor
    positions: Tensor
    lengths: Tensor


def classify_tokens(vision: Tensor, valid: Tensor | None) -> TokenTypes:
    """Tells the type of each token (`docs/algorithm.md`, Notation).

    The question is the valid text after the last vision token. A prompt that ends in vision has none: its last valid
    token stands for it. A sample without vision is all question.

    Args:
        vision: `[B, N]` bool, vision placeholders.
        valid: `[B, N]` bool, False at padding (left or right); None where nothing is padded.
    """
    if valid is None:
        valid = torch.ones_like(vision)
    vision = vision & valid
    counted = prefix_count(valid)
    length = counted[:, -1:]
    last_vision = torch.where(vision, counted, 0.0).amax(1, keepdim=True)
    question = valid & (counted > last_vision)
    question = question | (valid & (counted == length) & (last_vision == length))
    positions = torch.where(valid, counted - 1.0, -1.0)
    return TokenTypes(valid, vision, question, positions.to(torch.int64), length.squeeze(1).to(torch.int64))


def prefix_count(mask: Tensor) -> Tensor:
    """How many are True up to and including each column: `[B, N]` float32 of `mask [B, N]` bool."""
    return mask.to(torch.float32).cumsum(1)


def forced_tokens(token_types: TokenTypes, *, sink_tokens: int) -> Tensor:
    """Returns `[B, N]` bool: the tokens that are kept whatever their score, the first `sink_tokens` and the last."""
    last = token_types.positions == token_types.lengths.unsqueeze(1) - 1
    return token_types.valid & ((token_types.positions < sink_tokens) | last)


def vision_count(token_types: TokenTypes, *, config: EvictionConfig) -> Tensor:
    """Returns `[B]` int64: the vision tokens that [`allocate`][tgvkv_compile.ops.eviction.budgeting.allocate] budgets.

    With `budget_of="vision"` the sink and last positions count as text (`docs/algorithm.md`, Options), so vision tokens
    that stand there are not counted; otherwise a prompt that opens with an image would lose text to its sinks.
    """
    counted = token_types.vision
    if config.budget_of == "vision":
        counted = counted & ~forced_tokens(token_types, sink_tokens=config.sink_tokens)
    return counted.to(torch.int64).sum(1)
