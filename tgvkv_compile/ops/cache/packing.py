"""Eviction at prefill: the kept entries of every layer go into one arena, each layer into its own segment."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig, KVDtype
from tgvkv_compile.ops.cache.rows import KVForms, to_rows
from tgvkv_compile.ops.cache.window import newest, window_size, write_window
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate, segment_capacity
from tgvkv_compile.ops.token_types import TokenTypes, vision_count


class Arena(NamedTuple):
    """`key [B, Hkv, T, D]`, `value [B, Hkv, T, D]`, `slot_position` int32 `[B, T]` (see `CompactState`)."""

    key: Tensor
    value: Tensor
    slot_position: Tensor


def allocate_layers(mass: tuple[Tensor, ...], token_types: TokenTypes, **options: Any) -> Allocation:
    """`allocate` from the layers' masses, `[B]` each; `options` are the fields of `EvictionConfig`.

    Functions that stand in a graph take options one by one: a graph's constants must be plain values.
    """
    config = EvictionConfig(**options)
    return allocate(torch.stack(mass, dim=1), token_types.lengths, vision_count(token_types, config=config), config=config)


@functools.lru_cache(maxsize=64)
def allocated_by(function: Callable[..., Allocation], budgeting: str | Callable[[Tensor], Tensor]) -> Callable[..., Allocation]:
    """`allocate_layers` or its like as a graph calls it: itself for a name; for a function of somebody else's, one with that.

    Such a one belongs to that function's module, so that no cache on disk takes it for one of this package.
    """
    if isinstance(budgeting, str):
        return function

    def allocate_by(*args: Any, **options: Any) -> Allocation:
        return function(*args, **{**options, "budgeting": budgeting})

    allocate_by.__module__ = getattr(budgeting, "__module__", None) or "__main__"
    return allocate_by


def count_vision(token_types: TokenTypes, **options: Any) -> Tensor:
    """`vision_count`, int64 `[B]`; `options` are the fields of `EvictionConfig`."""
    return vision_count(token_types, config=EvictionConfig(**options))


def by_layer(values: Tensor) -> tuple[Tensor, ...]:
    """The columns of `[B, L]`: `L` times `[B]`."""
    return values.unbind(1)


def new_arena(key: Tensor, value: Tensor, slots: int | torch.SymInt, kv_dtype: KVDtype | None = None) -> Arena:
    """An empty arena.

    Args:
        key: `[B, Hkv, N, D]`, like the keys that it is for.
        value: `[B, Hkv, N, D]`, like the values.
        slots: T.
        kv_dtype: How they are held, see `EvictionConfig`.
    """
    batch, heads = key.shape[:2]
    forms = KVForms.of(key, value, kv_dtype)
    return Arena(
        key.new_zeros((batch, heads, slots, forms.key.size), dtype=forms.key.dtype),
        value.new_zeros((batch, heads, slots, forms.value.size), dtype=forms.value.dtype),
        torch.full((batch, slots), -1, dtype=torch.int32, device=key.device),
    )


def fitting_reserve(
    allocation: Allocation, lengths: Tensor, arena: Arena, reserve: int, *, before: Tensor | int = 0, **options: Any
) -> Tensor:
    """How many decode steps every segment of every sample can be given room for.

    That is `reserve`, by the bound that sized the arena; but samples much shorter than their batch may be owed more
    growth than the bound of the longest allows. Then it is the first of `reserve / 2, reserve / 4, ..., 0` that fits.

    Args:
        allocation: What each layer keeps, `[B, L]`.
        lengths: int64 `[B]`, valid tokens.
        arena: The empty arena.
        reserve: Decode steps asked for.
        before: Slots before the first segment, int64 `[]`.
        **options: The fields of `EvictionConfig`.

    Returns:
        int64 `[]`.
    """
    config = EvictionConfig(**options)
    slots = arena.key.shape[2] - before - 1
    room = torch.zeros((), dtype=torch.int64, device=lengths.device)
    steps = reserve
    while steps > 0:
        capacity = segment_capacity(allocation.kept, allocation.rate, lengths, steps, config=config)
        fits = (capacity.sum(1) <= slots).all()
        room = torch.where(fits, room.clamp(min=steps), room)
        steps //= 2
    return room


def segment_starts(
    allocation: Allocation, lengths: Tensor, room: Tensor, *, before: Tensor | int = 0, **options: Any
) -> Tensor:
    """First slot of each layer, so that `room` decode steps find a slot in every segment.

    Args:
        allocation: What each layer keeps, `[B, L]`.
        lengths: int64 `[B]`, valid tokens.
        room: int64 `[]`, of `fitting_reserve`.
        before: Slots before the first segment, int64 `[]`.
        **options: The fields of `EvictionConfig`.

    Returns:
        int64 `[B, L]`.
    """
    config = EvictionConfig(**options)
    steps = room.expand(lengths.shape[0])
    capacity = segment_capacity(allocation.kept, allocation.rate, lengths, steps, config=config)
    return before + capacity.cumsum(1) - capacity


def evict_into(
    arena: Arena,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    positions: Tensor,
    start: Tensor,
    kv_dtype: KVDtype | None = None,
) -> None:
    """Writes a layer's kept entries, in position order, into its segment of the arena, which is updated in place.

    What is not kept lands in the last slot, which belongs to no segment.

    Args:
        arena: Segments of other layers stay as they are.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        keep: bool `[B, N]`.
        positions: int64 `[B, N]`, -1 at padding.
        start: int64 `[B]`, the segment's first slot.
        kv_dtype: How the arena holds keys and values, see `EvictionConfig`.
    """
    scrap = arena.key.shape[2] - 1
    slot = torch.where(keep, start[:, None] + keep.to(torch.int64).cumsum(1) - 1, scrap)
    written = torch.where(keep, positions, -1).to(torch.int32)
    for part, tensor in ((arena.key, key), (arena.value, value)):
        rows = to_rows(tensor, kv_dtype, keys=tensor is key)
        part.scatter_(2, slot[:, None, :, None].expand(rows.shape), rows)
    arena.slot_position.scatter_(1, slot, written)


def open_window(
    arena: Arena, key: Tensor, value: Tensor, positions: Tensor, lengths: Tensor, kept: Tensor, *, layer: int
) -> None:
    """Writes a layer's newest tokens into its window (see `ops.cache.window`), kept or not; the arena is updated in place.

    Args:
        arena: In `"int4"`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        positions: int64 `[B, N]`, -1 at padding.
        lengths: int64 `[B]`, tokens so far.
        kept: int64 `[B, L]`, tokens that each layer keeps.
        layer: Whose window.
    """
    write_window(arena, *newest(key, value, positions, lengths), window_size(kept), layer=layer)


class Bookkeeping(NamedTuple):
    """`segment_len`, `next_slot`, `protect_from`: int64 `[B, L]` each (see `CompactState`)."""

    segment_len: Tensor
    next_slot: Tensor
    protect_from: Tensor


def open_segments(keeps: tuple[Tensor, ...], token_types: tuple[TokenTypes, ...], starts: Tensor) -> Bookkeeping:
    """The state of freshly packed segments.

    Args:
        keeps: bool `[B, N]` per layer.
        token_types: Of the `N` tokens, per layer.
        starts: int64 `[B, L]`.

    Returns:
        Lengths, next slots and the first protected positions (the first kept token of `R`; algorithm, Decode 3).
    """
    length = torch.stack([keep.sum(1) for keep in keeps], dim=1)
    return Bookkeeping(length, starts + length, protected_from(keeps, token_types))


def protected_from(keeps: tuple[Tensor, ...], token_types: tuple[TokenTypes, ...]) -> Tensor:
    """`[B, L]` int64: the first kept position of `R` in each layer, where its protected suffix begins (algorithm, Decode 3).

    Args:
        keeps: bool `[B, N]` per layer.
        token_types: Of the `N` tokens, per layer.
    """
    beyond = torch.iinfo(torch.int64).max
    found = [
        torch.where(keep & theirs.question, theirs.positions, beyond).amin(1)
        for keep, theirs in zip(keeps, token_types, strict=True)
    ]
    return torch.stack(found, dim=1)
