"""Custom op `tgvkv::decode_step`: append, attend, score and choose the slot to overwrite, for one layer and one token."""

from typing import Any

import torch
from torch import Tensor, library

from tgvkv_compile.config import EvictionConfig, KVDtype
from tgvkv_compile.ops import kernels
from tgvkv_compile.ops.cache.segments import NewTokens, append, attend_segment
from tgvkv_compile.ops.eviction.decode import choose_eviction, next_protected
from tgvkv_compile.ops.kernels.cpu import decode as cpu_decode
from tgvkv_compile.ops.state import WRITTEN_BY_STEPS, CompactState, read_state, state_schema


def append_and_attend(
    query: Tensor, key: Tensor, value: Tensor, state: CompactState, layer: int, scale: float, kv_dtype: KVDtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The new token goes to its slot and attends to its segment; the arenas and `slot_position` are updated in place.

    Args:
        query: `[B, H, 1, D]`.
        key: `[B, Hkv, 1, D]`.
        value: `[B, Hkv, 1, D]`.
        state: Before this token.
        layer: Which segment.
        scale: What `q @ k` is multiplied by.
        kv_dtype: How the arenas hold keys and values, see `EvictionConfig`.

    Returns:
        `(output [B, H, 1, D], head-mean attention float32 [B, W], positions int64 [B, W])`, of the segment's `W` entries.
    """
    new = NewTokens(key, value, state.lengths[:, None], state.next_slot[:, layer, None], layer, kv_dtype)
    append(state, new)
    seen = attend_segment(query, state, state.segment_start[:, layer], state.segment_len[:, layer] + 1, scale, new)
    return seen.output, seen.attention[:, 0], seen.positions


def evict(attention: Tensor, positions: Tensor, state: CompactState, *, layer: int, decode: str, sink_tokens: int) -> None:
    """Frees the slot that the step looked at least, if one is due; the bookkeeping of `layer` is updated in place.

    Args:
        attention: float32 `[B, W]`, the step's head-mean attention to the segment's entries.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        state: Its `segment_len` and `lengths` do not count the new token yet.
        layer: Which segment.
        decode: `"ratio"`, `"fixed"` or `"keep"`.
        sink_tokens: How many first positions are never evicted.
    """
    start, length = state.segment_start[:, layer], state.segment_len[:, layer] + 1
    protected = next_protected(positions, state.protect_from[:, layer])
    config = EvictionConfig(decode=decode, sink_tokens=sink_tokens)  # type: ignore[arg-type]
    evicted = choose_eviction(
        attention,
        positions,
        length,
        state.lengths + 1,
        state.keep_rate[:, layer],
        protected,
        config=config,
    )
    evicts = evicted >= 0
    freed = torch.where(evicts, start + evicted, start + length)
    remaining = length - evicts.to(length.dtype)
    # Where nothing is evicted this writes a slot that is free already: -1 over -1.
    last = state.slot_position.shape[1] - 1
    freed_or_scrap = torch.where(evicts, freed, last)
    state.slot_position[torch.arange(len(freed), device=freed.device), freed_or_scrap] = -1
    state.segment_len[:, layer] = remaining
    state.next_slot[:, layer] = freed
    state.protect_from[:, layer] = protected


# Not `custom_op`: its wrapper takes longer than the rest of a short step's bookkeeping, in every layer.
library.define(
    "tgvkv::decode_step",
    f"(Tensor query, Tensor key, Tensor value, {state_schema(*WRITTEN_BY_STEPS)}, "
    "SymInt layer, float scale, str decode, SymInt sink_tokens, str? kv_dtype=None) -> Tensor",
)


def _decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """The plain functions, on any device."""
    compact, (layer, scale, decode, sink_tokens, *held) = read_state(rest)
    output, attention, positions = append_and_attend(query, key, value, compact, layer, scale, *held)
    evict(attention, positions, compact, layer=layer, decode=decode, sink_tokens=sink_tokens)
    return output


library.impl("tgvkv::decode_step", "default", _decode_step)


def _decode_step_on_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """A kernel in C++; the plain functions for what it is not made for, and without a compiler."""
    compact, (layer, scale, decode, sink_tokens, *held) = read_state(rest)
    kernel = cpu_decode.kernel_for(query, key, value, compact, *held)
    if kernel is None:
        return _decode_step(query, key, value, *rest)
    return cpu_decode.decode_step_by(kernel, query, key, value, compact, layer, scale, decode, sink_tokens)


library.impl("tgvkv::decode_step", "cpu", _decode_step_on_cpu)


def _decode_step_on_cuda(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Two Triton kernels; the plain functions for a dtype or head dim that these are not made for."""
    if not kernels.available():
        return _decode_step(query, key, value, *rest)
    from tgvkv_compile.ops.kernels.triton import decode as fused

    compact, (layer, scale, decode, sink_tokens, *held) = read_state(rest)
    if not fused.fused_applies(query, compact, *held):
        return _decode_step(query, key, value, *rest)
    return fused.fused_decode_step(query, key, value, compact, layer, scale, decode, sink_tokens, *held)


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
    kv_dtype: KVDtype | None = None,
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
        kv_dtype: How the arenas hold keys and values, see `EvictionConfig`.

    Returns:
        The attention output `[B, H, 1, D]`, dtype of `query`.
    """
    output: Tensor = torch.ops.tgvkv.decode_step(query, key, value, *state, layer, scale, decode, sink_tokens, kv_dtype)
    return output
