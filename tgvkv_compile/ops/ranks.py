"""Means over the ranks of a process group, each of which holds some of the query heads (tensor parallelism).

`A` is a mean over *all* query heads, and all ranks must evict the same entries. What is linear in `A` may be computed from a
rank's own heads and averaged over the ranks; what is not must wait for the average. In prefill the sums over rows are linear,
and a ranking is made of averaged sums: TGV-KV's question weighs rows once more by what it has received, so a layer takes two
all-reduces in prefill, of `[B, 2, N]` and `[B, 1, N]` float32.

An all-reduce hands every rank the same bits, and all decisions are made of what it handed out.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tgvkv_compile.ops.weighing import Walk, Weighed


def mean_over_ranks(mean: Tensor, heads: int, group: str) -> Tensor:
    """The mean over all ranks' heads, by one functional collective.

    Heads need not be split evenly: each rank's mean counts by its heads.

    Args:
        mean: float32, any shape; the mean over this rank's heads.
        heads: How many heads this rank has.
        group: Name of the process group.

    Returns:
        As `mean`, the same bits on every rank.
    """
    weighted = torch.cat([mean.flatten() * heads, mean.new_full((1,), heads)])
    total = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(weighted, "sum", group))
    return cast(Tensor, (total[:-1] / total[-1]).reshape(mean.shape))


def over_ranks(walk: Walk, heads: int, group: str) -> Walk:
    """What `walk` sums over this rank's heads, averaged over all ranks' heads; what is asked together by one collective.

    Which rows see a column is the same on all ranks.

    Args:
        walk: Sums rows of this rank's head-mean attention.
        heads: How many heads this rank has.
        group: Name of the process group.
    """

    def walk_all(asked: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Weighed]:
        found = walk(asked)
        mean = mean_over_ranks(torch.cat([one.sums for one in found], dim=1), heads, group)
        return [Weighed(mean[:, at : at + 1], one.seen) for at, one in enumerate(found)]

    return walk_all
