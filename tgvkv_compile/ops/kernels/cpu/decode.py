"""Calls the kernel of `tgvkv::decode_step` on CPUs."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.kernels import DECODE_MODES
from tgvkv_compile.ops.kernels.cpu.compiled import kernel, record
from tgvkv_compile.ops.state import CompactState

_SIZES = (
    *("batch", "heads", "kv_heads", "dim", "slots", "layers", "layer"),
    *("query_sample", "query_head", "key_sample", "key_head", "value_sample", "value_head"),
    *("keys_sample", "keys_head", "values_sample", "values_head"),
    *("mode", "sink_tokens", "threads"),
)
_POINTERS = (
    *("query", "key", "value", "key_arena", "value_arena", "output", "slot_position"),
    *("segment_start", "segment_len", "next_slot", "protect_from", "keep_rate", "lengths"),
)


_Step = record(_SIZES, _POINTERS)
"""`struct Step` of the source."""


def kernel_for(
    query: Tensor, key: Tensor, value: Tensor, state: CompactState, kv_dtype: KVDtype | None = None
) -> Callable[..., None] | None:
    """The kernel, if there is one for these tensors: all of one dtype, and laid out as rewritten graphs lay them out.

    Args:
        query: As of `decode_step`, and so are the others.
        key: As there.
        value: As there.
        state: As there.
        kv_dtype: As there; for quantised arenas the others are of one dtype.
    """
    arenas = (state.key_arena, state.value_arena)
    alike = (key, value, *arenas) if kv_dtype is None else (key, value)
    if any(tensor.dtype != query.dtype for tensor in alike):
        return None
    rows = all(tensor.stride(3) == 1 for tensor in (query, key, value, *arenas))
    slots = all(arena.stride(2) == arena.shape[3] for arena in arenas)
    if not rows or not slots or not all(tensor.is_contiguous() for tensor in state[2:]):
        return None
    return kernel("step" if kv_dtype is None else f"step_{kv_dtype}", query.dtype)


def decode_step_by(
    kernel: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompactState,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
) -> Tensor:
    """One step of one layer; arguments as of `decode_step`, `kernel` as [`kernel_for`][] gave it."""
    batch, heads, _, dim = query.shape
    output = query.new_empty((batch, heads, 1, dim))
    strided = (query, key, value, state.key_arena, state.value_arena)
    sizes: list[Any] = [batch, heads, key.shape[1], dim, state.slot_position.shape[1], state.segment_start.shape[1], layer]
    for tensor in strided:
        sizes += tensor.stride()[:2]
    sizes += [DECODE_MODES[decode], sink_tokens, torch.get_num_threads()]
    pointers = [tensor.data_ptr() for tensor in (*strided, output, *state[2:])]
    kernel(ctypes.byref(_Step(*sizes, scale, *pointers)))
    return output
