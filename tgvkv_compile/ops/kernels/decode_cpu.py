"""The kernel of a decode step on CPUs: `tgvkv::decode_step` without some fifty operators on a few hundred numbers each."""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.errors import first_line
from tgvkv_compile.ops.state import CompactState

log = logging.getLogger("tgvkv_compile")

MODES = {"ratio": 0, "fixed": 1, "keep": 2}
_FUNCTIONS = {torch.float32: "step_float32", torch.bfloat16: "step_bfloat16"}
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


class _Step(ctypes.Structure):
    """`struct Step` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


@functools.cache
def kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel by dtype of keys and values; none where there is no C++ compiler that works.

    Inductor compiles and caches it as it does its own kernels.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8"))
    except Exception as error:  # a compiler that is missing or fails has no common class of errors
        log.warning("decode steps run as plain operators, several times slower: C++ failed to compile (%s)", first_line(error))
        return {}
    return {dtype: getattr(library, name) for dtype, name in _FUNCTIONS.items()}


def kernel_for(query: Tensor, key: Tensor, value: Tensor, state: CompactState) -> Callable[..., None] | None:
    """The kernel, if there is one for these tensors: all of one dtype, and laid out as rewritten graphs lay them out."""
    arenas = (state.key_arena, state.value_arena)
    alike = all(tensor.dtype == query.dtype for tensor in (key, value, *arenas))
    if not alike or query.dtype not in _FUNCTIONS:
        return None
    rows = all(tensor.stride(3) == 1 for tensor in (query, key, value, *arenas))
    slots = all(arena.stride(2) == arena.shape[3] for arena in arenas)
    if not rows or not slots or not all(tensor.is_contiguous() for tensor in state[2:]):
        return None
    return kernels().get(query.dtype)


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
    sizes += [MODES[decode], sink_tokens, torch.get_num_threads()]
    pointers = [tensor.data_ptr() for tensor in (*strided, output, *state[2:])]
    kernel(ctypes.byref(_Step(*sizes, scale, *pointers)))
    return output
