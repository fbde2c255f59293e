"""A later turn with new vision: budgeting runs again over what the cache still holds and the new tokens.

`docs/algorithm.md`, "Later turns of a chat". The candidates of a layer are its survivors, `W` columns in position
order (-1 where a sample has fewer), and behind them the `Q` new tokens. Scores, budgets and selection are those of a
prefill; what is particular to a turn stands here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.attention.masks import valid_columns, visible_among_new
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens, vision_count


def vision_history(token_types: TokenTypes) -> Tensor:
    """Returns bool `[B, N]`: which positions of each sample (not columns: padding does not exist) are vision."""
    nothing = torch.zeros_like(token_types.vision)
    return extend_history(nothing[:, :0], token_types)


def extend_history(history: Tensor, new: TokenTypes) -> Tensor:
    """The history of a sample that has gained tokens.

    Args:
        history: bool `[B, P]`, which positions are vision, for at least all positions so far.
        new: The token types of `Q` new tokens, with their true positions.

    Returns:
        bool `[B, P + Q]`.
    """
    scrap = history.shape[1] + new.vision.shape[1]
    index = torch.where(new.valid, new.positions, scrap)
    room = torch.zeros_like(new.vision[:, :1]).expand(-1, new.vision.shape[1] + 1)
    return torch.cat([history, room], dim=1).scatter(1, index, new.vision)[:, :-1]


class WholePast(NamedTuple):
    """What a turn knows of an uncompressed past.

    Attributes:
        history: bool `[B, S]`, which positions are vision.
        lengths: int64 `[B]`, tokens.
        positions: int64 `[B, S]`, of each column, -1 for padding.
    """

    history: Tensor
    lengths: Tensor
    positions: Tensor


def whole_past(mask: Tensor | None, past: Tensor) -> WholePast:
    """What a turn knows of an uncompressed past: all of it is there, and none of it is vision.

    Args:
        mask: `[B|1, 1|H, Q, S + Q]`, which tells the padding in the past; None: there is none.
        past: `[B, Hkv, S, D]`.
    """
    length = past.shape[2]
    valid = torch.ones_like(past[:, 0, :, 0], dtype=torch.bool) if mask is None else valid_columns(mask, past)[:, :length]
    count = valid.to(torch.int64).cumsum(1)
    return WholePast(
        history=torch.zeros_like(valid),
        lengths=valid.to(torch.int64).sum(1),
        positions=torch.where(valid, count - 1, -1),
    )


def whole_rate(past: Tensor, num_layers: int) -> Tensor:
    """`[B, L]` float32: nothing is ever evicted of a sample that has seen no vision."""
    return past.new_ones((past.shape[0], num_layers), dtype=torch.float32)


def turn_token_types(vision: Tensor, mask: Tensor | None, lengths: Tensor) -> TokenTypes:
    """The token types of a turn's tokens, at their true positions; `lengths` of the result are the true total lengths.

    The question is the text after the last *new* vision token. A sample without new vision is all question.

    Args:
        vision: bool `[B, Q]`, new vision placeholders.
        mask: `[B|1, 1|H, Q, S]` over the logical sequence, which tells the padding among the new tokens; None: there is none.
        lengths: int64 `[B]`, tokens before this turn.
    """
    valid = None if mask is None else valid_columns(mask, lengths)[:, -vision.shape[1] :]
    token_types = classify_tokens(vision, valid)
    positions = torch.where(token_types.valid, token_types.positions + lengths.unsqueeze(1), -1)
    return token_types._replace(positions=positions, lengths=token_types.lengths + lengths)


def candidate_token_types(history: Tensor, positions: Tensor, new: TokenTypes) -> TokenTypes:
    """The token types of a layer's candidates: survivors keep theirs, and none of them is in the question.

    Args:
        history: bool `[B, P]`, of [`vision_history`][].
        positions: int64 `[B, W]`, of the layer's survivors; -1 where there is none.
        new: Of [`turn_token_types`][].

    Returns:
        TokenTypes of `W + Q` columns.
    """
    there = positions >= 0
    vision = history.gather(1, positions.clamp(min=0)) & there
    return TokenTypes(
        torch.cat([there, new.valid], dim=1),
        torch.cat([vision, new.vision], dim=1),
        torch.cat([torch.zeros_like(there), new.question], dim=1),
        torch.cat([positions, new.positions], dim=1),
        new.lengths,
    )


def candidate_mask(mask: Tensor | None, positions: Tensor, vision: Tensor) -> Tensor:
    """What new tokens see of a layer's candidates: every survivor, and of each other what the model's mask says.

    Args:
        mask: `[B|1, 1|H, Q, S]` over the logical sequence, or None (causal).
        positions: int64 `[B, W]`, of the layer's survivors; -1 where there is none.
        vision: bool `[B, Q]`, any tensor of the new tokens.

    Returns:
        bool `[B, 1, Q, W + Q]`.
    """
    batch, count = vision.shape
    among_new = visible_among_new(mask, batch, count, vision.device)
    survivors = (positions >= 0)[:, None, :].expand(batch, count, positions.shape[1])
    return torch.cat([survivors, among_new], dim=2)[:, None]


def allocate_again(
    mass: tuple[Tensor, ...],
    candidates: tuple[TokenTypes, ...],
    history: Tensor,
    new: TokenTypes,
    keep_rate: Tensor,
    **options: Any,
) -> Allocation:
    """`allocate` for a turn: `N` and `|V|` are those of the whole request, and no layer keeps more than there is.

    A sample without new vision is a continuation: it keeps all its candidates and its rates.

    Args:
        mass: float32 `[B]` per layer, from the new rows.
        candidates: TokenTypes per layer, of [`candidate_token_types`][].
        history: bool `[B, P]`, which positions before this turn are vision.
        new: Of [`turn_token_types`][].
        keep_rate: float32 `[B, L]`, `r_l` before this turn.
        **options: The fields of `EvictionConfig`.
    """
    config = EvictionConfig(**options)
    everywhere = torch.arange(history.shape[1], device=history.device).expand(history.shape)
    before = TokenTypes(history, history, torch.zeros_like(history), everywhere, new.lengths)
    num_vision = vision_count(before, config=config) + vision_count(new, config=config)
    budget = allocate(torch.stack(mass, dim=1), new.lengths, num_vision, config=config)
    there = torch.stack([token_types.valid.to(torch.int64).sum(1) for token_types in candidates], dim=1)
    sees = new.vision.any(1, keepdim=True)
    kept = torch.where(sees, torch.minimum(budget.kept, there), there)
    return Allocation(kept, torch.where(sees, budget.rate, keep_rate))


def join_candidates(survivors: Tensor, new: Tensor) -> Tensor:
    """`[B, Hkv, W, D]` and `[B, Hkv, Q, D]` to `[B, Hkv, W + Q, D]`."""
    return torch.cat([survivors, new], dim=2)
