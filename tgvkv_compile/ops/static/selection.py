"""Selection and packing for graphs of static shapes, without any operator that sorts.

Exported engines allow neither sorting nor indices of unknown number: TensorRT's TopK takes a constant `k` of at most 3840,
it has no argsort, searchsorted or kthvalue, and its CumSum takes floats only. So the score of the last entry kept is found by
bisection on the bits of float32, a fixed number of compare-and-sum steps, and slots by a prefix sum. Counts are float32
here: whole numbers, exact below `2 ** 24` tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.ops.token_types import TokenTypes, forced_tokens, prefix_count

_SMALLEST_NORMAL = 2.0**-126
# From the exponent -126 every one up to 127 is reached by taking some of these, the largest first, and none above it.
_EXPONENT_STEPS = (64, 64, 62, 32, 16, 8, 4, 2, 1)
_MANTISSA_BITS = 23
_LARGEST = torch.finfo(torch.float32).max


def select_by_threshold(score: Tensor, tier: Tensor, token_types: TokenTypes, kept: Tensor, *, sink_tokens: int) -> Tensor:
    """[`select_tokens`][tgvkv_compile.ops.eviction.selection.select_tokens] without sorting: the same tokens, ties included.

    Scores are sums of probabilities. A NaN or a negative one counts as 0, an infinite one as the largest float32.

    Args:
        score: `[B, N]` float32.
        tier: `[B, N]` int64, 0 to 2.
        token_types: Of the `N` tokens.
        kept: `[B]` int64, how many tokens to keep: at least the forced ones, at most the valid ones.
        sink_tokens: How many first positions are forced.

    Returns:
        `[B, N]` bool with `kept` True per row.
    """
    forced = forced_tokens(token_types, sink_tokens=sink_tokens)
    others = token_types.valid & ~forced
    rank = tier.to(torch.float32)  # engines compare floats
    rest = kept.to(torch.float32).unsqueeze(1) - _count(forced)
    stays = forced
    searched, wanted = torch.zeros_like(forced), torch.zeros_like(rest)
    open_ = rest >= 0.0  # where no tier was found yet that only a part of stays
    # Of one tier a part stays, all of those above and none of those below: the threshold is searched in that one only.
    for which in (2.0, 1.0, 0.0):
        members = others & (rank == which)
        count = _count(members)
        parted = open_ & (rest < count)
        # Not a `where` of bools: ONNX Runtime has none.
        searched = searched | (parted & members)
        wanted = torch.where(parted, rest, wanted)
        open_ = open_ & ~parted
        stays = stays | (members & open_)
        rest = rest - count
    return stays | _best(score, searched, wanted)


def select_in_layers(
    scores: tuple[Tensor, ...], tiers: tuple[Tensor, ...], token_types: TokenTypes, kept: Tensor, *, sink_tokens: int
) -> tuple[Tensor, ...]:
    """[`select_by_threshold`][] of all layers at once: one search for all, so that its steps stand in a graph once.

    Args:
        scores: float32 `[B, N]` per layer.
        tiers: int64 `[B, N]` per layer.
        token_types: Of the `N` tokens.
        kept: int64 `[B, L]`.
        sink_tokens: As there.

    Returns:
        bool `[B, N]` per layer.
    """
    layers = len(scores)
    repeated = TokenTypes(*(field.repeat(layers, *(1,) * (field.dim() - 1)) for field in token_types))
    ranked = (torch.cat(scores), torch.cat(tiers))
    keep = select_by_threshold(*ranked, repeated, kept.t().reshape(-1), sink_tokens=sink_tokens)
    return keep.chunk(layers)


def _best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count [B, 1]` tokens with the highest scores `among [B, N]`; of equal scores the later positions."""
    ranked = torch.where(score.isnan(), 0.0, score).clamp(0.0, _LARGEST)
    ranked = torch.where(among, ranked, -1.0)
    threshold = _threshold(ranked, count)
    above, equal = ranked > threshold, ranked == threshold
    later = _count(equal) - prefix_count(equal) + 1.0  # itself and those behind it
    return above | (equal & (later <= count - _count(above)))


def _threshold(ranked: Tensor, count: Tensor) -> Tensor:
    """The largest float32 `[B, 1]` that at least `count [B, 1]` of `ranked [B, N]` reach; 0 if only 0 is.

    The float is put together as its bits are: the exponent by multiplications with powers of two, then the mantissa, each
    bit by an addition. All of them are exact, so no operator that reinterprets bits is needed. Below the normal numbers
    the mantissa's steps are those of the subnormal ones.
    """
    smallest = torch.full_like(count, _SMALLEST_NORMAL)
    power = smallest
    for step in _EXPONENT_STEPS:
        candidate = power * 2.0**step
        power = torch.where(_reached(ranked, candidate, count), candidate, power)
    threshold = torch.where(_reached(ranked, smallest, count), power, 0.0)
    bit = power
    for _ in range(_MANTISSA_BITS):
        bit = bit * 0.5
        candidate = threshold + bit
        threshold = torch.where(_reached(ranked, candidate, count), candidate, threshold)
    return threshold


def _reached(ranked: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
    return _count(ranked >= candidate) >= count


def _count(mask: Tensor) -> Tensor:
    """How many of each row are True: `[B, 1]` float32."""
    return mask.to(torch.float32).sum(1, keepdim=True)


def pack_columns(keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Which column goes into each of `capacity` slots: the kept ones, in their order.

    Args:
        keep: `[B, N]` bool. Of more than `capacity` the first are taken; what decides on `keep` sees to it that there are not
            (`ops.static.capacities`).
        capacity: Slots, `C`.

    Returns:
        `columns [B, C]` int64, 0 where a slot stays empty, and `filled [B, C]` bool.
    """
    counted = prefix_count(keep)
    fits = keep & (counted <= capacity)
    scrap = capacity  # one slot more than there are takes what is not kept
    slot = torch.where(fits, counted - 1.0, float(scrap)).to(torch.int64)
    index = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape)
    columns = torch.zeros((keep.shape[0], capacity + 1), dtype=torch.int64, device=keep.device)
    columns = columns.scatter(1, slot, index)[:, :capacity]
    filled = torch.arange(capacity, device=keep.device) < counted[:, -1:]
    return torch.where(filled, columns, 0), filled


class PackedLayer(NamedTuple):
    """A layer's slots; what stands in an empty one is finite if the first token's entry is, and nothing else.

    Attributes:
        key: `[B, Hkv, C, D]`.
        value: `[B, Hkv, C, D]`.
        slot_position: int64 `[B, C]`, -1 where a slot is empty.
    """

    key: Tensor
    value: Tensor
    slot_position: Tensor


def pack_layer(key: Tensor, value: Tensor, positions: Tensor, keep: Tensor, capacity: int) -> PackedLayer:
    """A layer's kept entries in `capacity` slots of its own, in position order.

    Args:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        positions: int64 `[B, N]`, -1 at padding.
        keep: `[B, N]` bool.
        capacity: Slots, `C`.
    """
    columns, filled = pack_columns(keep, capacity)

    def packed(entries: Tensor) -> Tensor:
        return entries.gather(2, columns[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3]))

    return PackedLayer(packed(key), packed(value), torch.where(filled, positions.gather(1, columns), -1))
