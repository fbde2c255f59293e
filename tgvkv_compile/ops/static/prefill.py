"""A prefill for graphs of static shapes: attention with its scores, budgets that fit, packed layers.

Rows are walked in blocks whose number is fixed and whose length follows the prompt, so that no `[N, N]` is held. A block's
probabilities give its part of the output and of the sums that the scores are made of: engines have no attention that tells
its log-sum-exp.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.attention.masks import vision_positions
from tgvkv_compile.ops.attention.probabilities import causal_probabilities, exact_matmul
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate
from tgvkv_compile.ops.policy.rank import rank_by_walk
from tgvkv_compile.ops.static.capacities import fit_allocation
from tgvkv_compile.ops.static.selection import pack_columns
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens, prefix_count, vision_count
from tgvkv_compile.ops.weighing import Weighed, add_rows

_BLOCK_BYTES = 1 << 30
_MAX_BLOCKS = 16  # every block stands in the graph, in every layer


class Scored(NamedTuple):
    """A layer's attention and what it says of the tokens.

    Attributes:
        output: `[B, H, N, D]`, dtype of the query.
        mass: float32 `[B]`, `m_l`.
        score: float32 `[B, N]`, as of [`rank_tokens`][tgvkv_compile.ops.policy.rank.rank_tokens].
        tier: int64 `[B, N]`.
    """

    output: Tensor
    mass: Tensor
    score: Tensor
    tier: Tensor


def block_count(batch: int, heads: int, max_prompt: int) -> int:
    """How many blocks the rows of a prompt are walked in, such that one holds 1 GiB of attention; at most 16."""
    whole = 4 * batch * heads * max_prompt * max_prompt
    return max(1, min(_MAX_BLOCKS, -(-whole // _BLOCK_BYTES)))


def token_types_from_mask(masks: tuple[Tensor, ...], attention_mask: Tensor) -> TokenTypes:
    """`classify_tokens` of merge masks, bool `[B, N, 1 | hidden]`, and `attention_mask [B, N]`, 0 at padding."""
    return classify_tokens(vision_positions(masks), attention_mask != 0)


def attend_and_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_types: TokenTypes,
    scale: float,
    blocks: int,
    question_rows: int,
    **options: Any,
) -> Scored:
    """Causal attention of a prompt, and what [`rank_tokens`][tgvkv_compile.ops.policy.rank.rank_tokens] says of its tokens.

    All of it in float32, whatever the dtype of the model.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        token_types: Of the `N` tokens; padding is not seen, and what it would see counts for nothing.
        scale: What `q @ k` is multiplied by.
        blocks: Of [`block_count`][]; `N` is a multiple of it.
        question_rows: The most tokens that a question has, in samples with vision.
        **options: `ranking`, `layer`, `budget` and `budget_of`, as of `rank_tokens`.
    """
    attended = _InBlocks(query, key, value, token_types, scale, blocks, question_rows)
    ranks = rank_by_walk(key, token_types, query.shape[2], attended.walk, **options)
    return Scored(attended.attend_all(), *ranks)


class _InBlocks:
    """Attention of a prompt in blocks of rows. What is first asked of its rows is summed in the pass that makes the output.

    What is asked later may weigh rows of the question only: these are gathered and looked at once more.

    Args:
        Those of [`attend_and_score`][].

    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, token_types: TokenTypes, scale: float, blocks: int, question_rows: int
    ) -> None:
        self._query, self._key, self._value, self._token_types, self._scale = query, key, value, token_types, scale
        self._blocks, self._question_rows = blocks, question_rows
        self._output: Tensor | None = None

    def attend_all(self) -> Tensor:
        """The output, `[B, H, N, D]`."""
        if self._output is None:
            self.walk([(self._token_types.valid, None)])  # a ranking that asks for no attention
        assert self._output is not None
        return self._output

    def walk(self, asked: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Weighed]:
        """See `Walk`."""
        if self._output is not None:
            return [self._weigh_question(weights) for weights, _ in asked]
        weights = torch.stack([weights.to(torch.float32) for weights, _ in asked], dim=1)
        rows = self._query.shape[2] // self._blocks
        outputs, parts = [], []
        for block in range(self._blocks):
            # The last block has no end: a slice up to the length would make its shape a minimum that exporters cannot solve.
            end = (block + 1) * rows if block < self._blocks - 1 else None
            output, part = self._attend(block * rows, end, weights)
            outputs.append(output)
            parts.append(part)
        self._output = torch.cat(outputs, dim=2)
        total = Weighed(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))
        return [Weighed(total.sums[:, one : one + 1], total.seen[:, one : one + 1]) for one in range(len(asked))]

    def _attend(self, start: int, end: int | None, weights: Tensor) -> tuple[Tensor, Weighed]:
        """Rows from `start` to `end` on the keys before `end`: `(output [B, H, R, D], sums [B, K, N])`."""
        query, key, value, token_types = self._query, self._key, self._value, self._token_types
        seen, later = token_types, 0
        if end is not None:
            key, value, later = key[:, :, :end], value[:, :, :end], query.shape[2] - end
            seen = token_types._replace(valid=token_types.valid[:, :end], positions=token_types.positions[:, :end])
        rows = slice(start or None, end)
        query = query[:, :, rows]
        visible = _visible(token_types.positions[:, rows], seen)
        probabilities = causal_probabilities(query, key, visible[:, None], self._scale)
        batch, heads, count, columns = probabilities.shape
        grouped = probabilities.view(batch, key.shape[1], heads // key.shape[1], count, columns)
        output = exact_matmul(grouped, value.to(torch.float32).unsqueeze(2)).flatten(1, 2)
        part = add_rows(probabilities.mean(1), visible, weights[:, :, rows])
        if end is not None:
            part = Weighed(*(torch.nn.functional.pad(sums, (0, later)) for sums in part))
        return output.to(query.dtype), part

    def _weigh_question(self, weights: Tensor) -> Weighed:
        """`[B, 1, N]` of `weights [B, N]`, 0 outside of the question."""
        query, token_types = self._query, self._token_types
        columns, filled = pack_columns(token_types.question, self._question_rows)
        chosen = torch.where(filled, weights.gather(1, columns), 0.0)
        index = columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        visible = _visible(token_types.positions.gather(1, columns), token_types)
        attention = causal_probabilities(query.gather(2, index), self._key, visible[:, None], self._scale).mean(1)
        return add_rows(attention, visible, chosen.unsqueeze(1))


def _visible(row_positions: Tensor, columns: TokenTypes) -> Tensor:
    """Rows at `row_positions [B, R]` see the valid `columns` up to themselves: bool `[B, R, S]`."""
    return (columns.positions.unsqueeze(1) <= row_positions.unsqueeze(2)) & columns.valid.unsqueeze(1)


def fit_layers(
    mass: tuple[Tensor, ...], token_types: TokenTypes, capacities: tuple[int, ...], new_tokens: int, **options: object
) -> Allocation:
    """`allocate` from the layers' masses, `[B]` each, fitted into `capacities`; `options` are those of `EvictionConfig`."""
    config = EvictionConfig(**options)  # type: ignore[arg-type]
    numbers = vision_count(token_types, config=config)
    wanted = allocate(torch.stack(mass, dim=1), token_types.lengths, numbers, config=config)
    return fit_allocation(wanted, token_types.lengths, capacities, new_tokens, config=config)


def static_protected_from(keeps: tuple[Tensor, ...], token_types: TokenTypes) -> Tensor:
    """[`protected_from`][tgvkv_compile.ops.cache.packing.protected_from] by counts in float32: int64 `[B, L]`.

    There is such a position: the last one is always kept and always in the question.

    Args:
        keeps: bool `[B, N]` per layer.
        token_types: Of the `N` tokens.
    """
    counted = prefix_count(token_types.valid)
    beyond = counted[:, -1:] + 1.0
    found = [torch.where(keep & token_types.question, counted, beyond).amin(1) for keep in keeps]
    return (torch.stack(found, dim=1) - 1.0).to(torch.int64)
