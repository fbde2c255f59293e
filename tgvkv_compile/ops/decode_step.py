"""Custom op `tgvkv::decode_step`: append, attend, score and choose the slot to overwrite, for one layer and one token."""

from typing import Any

import torch
from torch import Tensor, library

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops import kernels
from tgvkv_compile.ops.decode_eviction import choose_eviction, next_protected
from tgvkv_compile.ops.kernels.cpu import decode as cpu_decode
from tgvkv_compile.ops.segments import attend_segment
from tgvkv_compile.ops.state import CompactState


def append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_arena: Tensor,
    value_arena: Tensor,
    slot_position: Tensor,
    start: Tensor,
    length: Tensor,
    slot: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new token goes to its slot and attends to its segment; the arenas and `slot_position` are updated in place.

    Args:
        query: `[B, H, 1, D]`.
        key: `[B, Hkv, 1, D]`.
        value: `[B, Hkv, 1, D]`.
        key_arena: `[B, Hkv, T, D]`.
        value_arena: `[B, Hkv, T, D]`.
        slot_position: int32 `[B, T]`.
        start: int64 `[B]`, first slot of the layer.
        length: int64 `[B]`, its entries, the new one included.
        slot: int64 `[B]`, where the new one goes.
        lengths: int64 `[B]`, tokens before this one.
        scale: What `q @ k` is multiplied by.

    Returns:
        `(output [B, H, 1, D], head-mean attention float32 [B, W], positions int64 [B, W])`, of the segment's `W` entries.
    """
    samples = torch.arange(query.shape[0], device=query.device)
    # Under autocast a step's keys or values may have another dtype than the prompt's.
    key_arena[samples, :, slot] = key[:, :, 0].to(key_arena.dtype)
    value_arena[samples, :, slot] = value[:, :, 0].to(value_arena.dtype)
    slot_position[samples, slot] = lengths.to(slot_position.dtype)
    seen = attend_segment(query, key_arena, value_arena, slot_position, start, length, scale)
    return seen.output, seen.attention[:, 0], seen.positions


def evict(
    attention: Tensor,
    positions: Tensor,
    slot_position: Tensor,
    segment_start: Tensor,
    segment_len: Tensor,
    next_slot: Tensor,
    protect_from: Tensor,
    keep_rate: Tensor,
    lengths: Tensor,
    *,
    layer: int,
    decode: str,
    sink_tokens: int,
) -> None:
    """Frees the slot that the step looked at least, if one is due; the bookkeeping of `layer` is updated in place.

    Args:
        attention: float32 `[B, W]`, the step's head-mean attention to the segment's entries.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        slot_position: This and the following as in `CompactState`; `segment_len` does not count the new token yet.
        segment_start: As there.
        segment_len: As there.
        next_slot: As there.
        protect_from: As there.
        keep_rate: As there.
        lengths: As there, tokens before this one.
        layer: Which segment.
        decode: `"ratio"`, `"fixed"` or `"keep"`.
        sink_tokens: How many first positions are never evicted.
    """
    start, length = segment_start[:, layer], segment_len[:, layer] + 1
    protected = next_protected(positions, protect_from[:, layer])
    config = EvictionConfig(decode=decode, sink_tokens=sink_tokens)  # type: ignore[arg-type]
    evicted = choose_eviction(
        attention,
        positions,
        length,
        lengths + 1,
        keep_rate[:, layer],
        protected,
        config=config,
    )
    evicts = evicted >= 0
    freed = torch.where(evicts, start + evicted, start + length)
    remaining = length - evicts.to(length.dtype)
    # Where nothing is evicted this writes a slot that is free already: -1 over -1.
    last = slot_position.shape[1] - 1
    freed_or_scrap = torch.where(evicts, freed, last)
    slot_position[torch.arange(len(freed), device=freed.device), freed_or_scrap] = -1
    segment_len[:, layer] = remaining
    next_slot[:, layer] = freed
    protect_from[:, layer] = protected


# Not `custom_op`: its wrapper takes longer than the rest of a short step's bookkeeping, in every layer.
library.define(
    "tgvkv::decode_step",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_arena, Tensor(b!) value_arena, Tensor(c!) slot_position, "
    "Tensor segment_start, Tensor(d!) segment_len, Tensor(e!) next_slot, Tensor(f!) protect_from, Tensor keep_rate, "
    "Tensor lengths, SymInt layer, float scale, str decode, SymInt sink_tokens) -> Tensor",
)


def _decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_arena: Tensor,
    value_arena: Tensor,
    slot_position: Tensor,
    segment_start: Tensor,
    segment_len: Tensor,
    next_slot: Tensor,
    protect_from: Tensor,
    keep_rate: Tensor,
    lengths: Tensor,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
) -> Tensor:
    arenas = (key_arena, value_arena, slot_position)
    where = (segment_start[:, layer], segment_len[:, layer] + 1, next_slot[:, layer])
    output, attention, positions = append_and_attend(query, key, value, *arenas, *where, lengths, scale)
    books = (slot_position, segment_start, segment_len, next_slot, protect_from, keep_rate, lengths)
    evict(attention, positions, *books, layer=layer, decode=decode, sink_tokens=sink_tokens)
    return output


library.impl("tgvkv::decode_step", "default", _decode_step)


def _decode_step_on_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """A kernel in C++; the plain functions for what it is not made for, and without a compiler."""
    *state, layer, scale, decode, sink_tokens = rest
    compact = CompactState(*state)
    kernel = cpu_decode.kernel_for(query, key, value, compact)
    if kernel is None:
        return _decode_step(query, key, value, *rest)
    return cpu_decode.decode_step_by(kernel, query, key, value, compact, layer, scale, decode, sink_tokens)


library.impl("tgvkv::decode_step", "cpu", _decode_step_on_cpu)


def _decode_step_on_cuda(query: Tensor, key: Tensor, value: Tensor, key_arena: Tensor, *rest: Any) -> Tensor:
    """Two Triton kernels; the plain functions for a dtype or head dim that these are not made for."""
    if not kernels.available():
        return _decode_step(query, key, value, key_arena, *rest)
    from tgvkv_compile.ops.kernels import decode as fused

    if not fused.fused_applies(query, key_arena, rest[0]):
        return _decode_step(query, key, value, key_arena, *rest)
    *state, layer, scale, decode, sink_tokens = rest
    return fused.fused_decode_step(query, key, value, CompactState(key_arena, *state), layer, scale, decode, sink_tokens)


library.impl("tgvkv::decode_step", "cuda", _decode_step_on_cuda)


def _fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


library.register_fake("tgvkv::decode_step", _fake)


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompactState,
    *,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
) -> Tensor:
    """One decode step of one layer on its segment; the state is updated in place (algorithm, Decode 1 to 4).

    Args:
        query: `[B, H, 1, D]`.
        key: The new token's keys, `[B, Hkv, 1, D]`.
        value: The new token's values, `[B, Hkv, 1, D]`.
        state: The compact cache; `lengths` counts the tokens before this one and is left as it is.
        layer: Which segment.
        scale: What `q @ k` is multiplied by.
        decode: `"ratio"`, `"fixed"` or `"keep"`.
        sink_tokens: How many first positions are never evicted.

    Returns:
        The attention output `[B, H, 1, D]`, dtype of `query`.
    """
    output: Tensor = torch.ops.tgvkv.decode_step(query, key, value, *state, layer, scale, decode, sink_tokens)
    return output
