"""What a ranking is given of a layer, and what it says of the layer's tokens."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.token_types import TokenTypes
from tgvkv_compile.ops.weighing import Walk, Weighed, add_rows, weigh


class Layer(NamedTuple):
    """One layer of a prompt, or of a later turn with vision.

    The `R` rows are the queries of the last `R` of its `S` columns: all of a prompt (`R` is `S` is `N`), or the new tokens of a
    turn behind what the cache still holds.

    Attributes:
        key: `[B, Hkv, S, D]`, the keys, rotary embedding applied, of this rank's heads.
        tokens: What each of the `S` columns is: padding, vision, question; its position among the valid tokens of the sample.
        num_rows: `R`.
        share: float32 `[B]`, how many entries layers keep on average.
        number: Which layer.
        walk: What `weigh` calls.
        average: What `mean_heads` calls.
    """

    key: Tensor
    tokens: TokenTypes
    num_rows: int
    share: Tensor
    number: int
    walk: Walk
    average: Callable[[Tensor], Tensor]

    def rows(self, columns: Tensor) -> Tensor:
        """The part of `columns [B, S]` that stands for the rows, `[B, R]`."""
        return columns[:, columns.shape[1] - self.num_rows :]

    def newest(self, count: int | Tensor) -> Tensor:
        """The last `count` tokens of each sample (an int, or `[B]`), padding not counted: bool `[B, S]`."""
        first = self.tokens.lengths - count
        return self.tokens.valid & (self.tokens.positions >= first.unsqueeze(1))

    def mean_heads(self, values: Tensor) -> Tensor:
        """The mean over KV heads, those of other ranks included: float32 `[B, S]` of `[B, Hkv, S]`."""
        return self.average(values.to(torch.float32))

    def weigh(self, *asked: tuple[Tensor, Tensor | None]) -> tuple[Weighed, ...]:
        """Sums the rows of head-mean attention `A`, each row with its weight.

        What is asked for in one call is computed together; over ranks it is averaged by one collective.

        Args:
            *asked: Pairs of weights `[B, R]` (finite, at least 0) and of the columns that are wanted, bool `[B, S]`, where
                sums of others are of no use; None: all. Where few are wanted less is computed.

        Returns:
            Of each pair, float32: `sums [B, S]`, `sum_r w_r * A[r, :]`, and `seen [B, S]`, the weights of the rows that see the
            column.
        """
        found = self.walk(asked)
        return tuple(Weighed(one.sums[:, 0], one.seen[:, 0]) for one in found)


def attending(rows: AttentionRows) -> Walk:
    """Computes attention by the op `tgvkv::weigh`: all that is asked in one walk, or, with its normaliser, each by itself."""

    def walk(asked: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Weighed]:
        if rows.lse is not None:
            return [weigh(weights.unsqueeze(1), wanted, rows) for weights, wanted in asked]
        together = weigh(torch.stack([weights.to(torch.float32) for weights, _ in asked], dim=1), None, rows)
        return [Weighed(together.sums[:, one : one + 1], together.seen[:, one : one + 1]) for one in range(len(asked))]

    return walk


def materialised(attention: Tensor, visible: Tensor) -> Walk:
    """Reads attention that is there: `attention [B, R, S]` float32, averaged over heads, `visible [B | 1, R, S]`."""
    attention = attention.masked_fill(~visible, 0.0)

    def walk(asked: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Weighed]:
        return [add_rows(attention, visible, weights.unsqueeze(1)) for weights, _ in asked]

    return walk


class Ranked(NamedTuple):
    """What a ranking says of a layer's tokens.

    Attributes:
        score: float32 `[B, S]`, at least 0: of those of a tier the higher one stays, of equals the earlier. What it says of
            padding is not looked at.
        tier: int64 `[B, S]`, 0 to 2: the higher tier stays first. None: all are alike. Sinks and the last token stand above all
            tiers.
        layer_weight: float32 `[B]`, at least 0: by what a budget is shared out to layers. None: all are alike.
    """

    score: Tensor
    tier: Tensor | None = None
    layer_weight: Tensor | None = None


Ranking = Callable[[Layer], Ranked]
