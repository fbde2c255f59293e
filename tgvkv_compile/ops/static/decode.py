"""A decode step for graphs of static shapes: a layer has its own slots, and a slot without position is free.

The same step as `ops.cache.decode_step`, entry by entry. Positions and slots are compared and searched in float32, exact below
`2 ** 24`: engines reduce floats, and have no `argmin` of more than 3840.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.cache.segments import attend

_FAR = 2.0**25  # beyond every position and slot


class LayerState(NamedTuple):
    """A layer's cache before a step.

    Attributes:
        key: `[B, Hkv, C, D]`, with a free slot in every sample.
        value: `[B, Hkv, C, D]`.
        slot_position: int64 `[B, C]`, the position in each slot, -1 where it is free.
        protect_from: int64 `[B]`, first position of the protected suffix.
        keep_rate: float32 `[B]`, `r_l`.
        lengths: int64 `[B]`, tokens before this one.
    """

    key: Tensor
    value: Tensor
    slot_position: Tensor
    protect_from: Tensor
    keep_rate: Tensor
    lengths: Tensor


class Stepped(NamedTuple):
    """What a step leaves.

    Attributes:
        output: `[B, H, 1, D]`, dtype of the query.
        key: `[B, Hkv, C, D]`, the new entry written.
        value: `[B, Hkv, C, D]`, the new entry written.
        slot_position: int64 `[B, C]`, -1 where a slot is free: what was evicted among them.
        protect_from: int64 `[B]`.
    """

    output: Tensor
    key: Tensor
    value: Tensor
    slot_position: Tensor
    protect_from: Tensor


def static_decode_step(
    query: Tensor, key: Tensor, value: Tensor, state: LayerState, scale: float, decode: str, sink_tokens: int
) -> Stepped:
    """Appends the new token, attends, and frees the slot that was looked at least, if one is due (algorithm, Decode 1 to 4).

    Args:
        query: `[B, H, 1, D]`.
        key: The new token's keys, `[B, Hkv, 1, D]`.
        value: The new token's values, `[B, Hkv, 1, D]`.
        state: Of the layer, before this step; nothing of it is written to.
        scale: What `q @ k` is multiplied by.
        decode: `"ratio"`, `"fixed"` or `"keep"`.
        sink_tokens: How many first positions are never evicted.
    """
    slots = torch.arange(state.slot_position.shape[1], device=query.device).to(torch.float32)
    positions, new = state.slot_position.to(torch.float32), state.lengths.to(torch.float32).unsqueeze(1)
    slot = torch.where(positions < 0.0, slots, _FAR).amin(1, keepdim=True)
    index = slot.to(torch.int64)[:, None, :, None].expand(key.shape)
    key_cache = state.key.scatter(2, index, key.to(state.key.dtype))
    value_cache = state.value.scatter(2, index, value.to(state.value.dtype))
    positions = torch.where(slots == slot, new, positions)
    output, attention = attend(query, key_cache, value_cache, (positions >= 0.0)[:, None, None], scale)
    protected = _next_protected(positions, state.protect_from.to(torch.float32).unsqueeze(1))
    config = EvictionConfig(decode=decode, sink_tokens=sink_tokens)  # type: ignore[arg-type]
    goes = _evicted(attention[:, 0], positions, new + 1.0, state.keep_rate.unsqueeze(1), protected, config)
    positions = torch.where(goes, -1.0, positions)
    return Stepped(output, key_cache, value_cache, positions.to(torch.int64), protected.squeeze(1).to(torch.int64))


def _next_protected(positions: Tensor, protect_from: Tensor) -> Tensor:
    """[`next_protected`][tgvkv_compile.ops.eviction.decode.next_protected] of float32 `[B, C]` and `[B, 1]`: `[B, 1]`.

    A position above it is always there: the new token's.
    """
    return torch.where(positions > protect_from, positions, _FAR).amin(1, keepdim=True)


def _evicted(
    attention: Tensor, positions: Tensor, total: Tensor, rate: Tensor, protected: Tensor, config: EvictionConfig
) -> Tensor:
    """Where [`choose_eviction`][tgvkv_compile.ops.eviction.decode.choose_eviction] points: bool `[B, C]`, at most one a row."""
    evictable = (positions >= config.sink_tokens) & (positions < protected)
    if config.decode == "keep":
        return torch.zeros_like(evictable)
    length = (positions >= 0.0).to(torch.float32).sum(1, keepdim=True)
    due = rate != 1.0 if config.decode == "fixed" else length - total * rate >= 1.0
    smallest = torch.where(evictable, attention, torch.inf).amin(1, keepdim=True)
    candidates = evictable & (attention <= smallest)
    first = torch.where(candidates, positions, _FAR).amin(1, keepdim=True)
    return candidates & (positions == first) & due


def stack_layers(columns: tuple[Tensor, ...]) -> Tensor:
    """`[B]` of every layer to `[B, L]`."""
    return torch.stack(columns, dim=1)
