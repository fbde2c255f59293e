"""Capping candidates at prefill: what no layer will keep goes as soon as the layer is done."""

import math
from typing import NamedTuple, cast

import torch
from torch import SymInt, Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.token_types import TokenTypes

_FRACTION = 1 << 24
"""A fraction of a symbolic length is taken in integers, in parts of this."""


class Capped(NamedTuple):
    """The candidates of a layer, `C` columns in position order; samples that have fewer are padded behind them.

    Attributes:
        key: `[B, Hkv, C, D]`.
        value: `[B, Hkv, C, D]`.
        score: `[B, C]` float32.
        tier: `[B, C]` int64.
        token_types: Of the `C` columns.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    tier: Tensor
    token_types: TokenTypes


def cap_tokens(length: int | SymInt, cap: float, *, config: EvictionConfig) -> int | SymInt:
    """`C`, how many candidates a layer may have: `cap` times the mean budget, at least the forced tokens, at most all.

    Args:
        length: N, padding counted.
        cap: Multiple of the mean budget.
        config: `budget`, of the whole prompt; `sink_tokens`.
    """
    if isinstance(config.limit, int):
        wanted: int | SymInt = math.ceil(cap * config.limit)
    else:
        wanted = length * math.ceil(cap * config.limit * _FRACTION) // _FRACTION + 1
    wanted = torch.sym_max(wanted, config.sink_tokens + 1)  # type: ignore[no-untyped-call]
    return torch.sym_min(wanted, length)  # type: ignore[no-untyped-call, no-any-return]


def cap_layer(
    key: Tensor,
    value: Tensor,
    score: Tensor,
    tier: Tensor,
    token_types: TokenTypes,
    cap: float,
    budget: float | int,
    sink_tokens: int,
) -> Capped:
    """A layer's best `C` tokens in the order of selection, whatever its budget turns out to be.

    What [`select_tokens`][tgvkv_compile.ops.eviction.selection.select_tokens] keeps of these is what it keeps of all, as
    long as that is not more than `C`; else it keeps these.

    Args:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        score: `[B, N]` float32.
        tier: `[B, N]` int64.
        token_types: Of the `N` tokens.
        cap: As of [`cap_tokens`][].
        budget: As of `EvictionConfig`, of the whole prompt.
        sink_tokens: As there.
    """
    count = cap_tokens(key.shape[2], cap, config=EvictionConfig(budget, sink_tokens=sink_tokens))
    keep = select_tokens(score, tier, token_types, token_types.lengths.clamp(max=cast(int, count)), sink_tokens=sink_tokens)
    # Kept columns first, each kind in its order.
    columns = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
    wide = columns[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    there = keep.gather(1, columns)
    chosen = TokenTypes(
        there,
        token_types.vision.gather(1, columns) & there,
        token_types.question.gather(1, columns) & there,
        torch.where(there, token_types.positions.gather(1, columns), -1),
        token_types.lengths,
    )
    return Capped(key.gather(2, wide), value.gather(2, wide), score.gather(1, columns), tier.gather(1, columns), chosen)
