"""A decode step where heads are split over the ranks of a process group (`ops.ranks`): one all-reduce, of `[B, T]`."""

from typing import Any

import torch
from torch import Tensor, library

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops import ranks
from tgvkv_compile.ops.cache.decode_step import append_and_attend, evict
from tgvkv_compile.ops.cache.segments import segment_positions
from tgvkv_compile.ops.state import CompactState, read_state, state_schema

_WRITTEN_BY_ATTENTION = ("key_arena", "value_arena", "slot_position")
_WRITTEN_BY_EVICTION = ("slot_position", "segment_len", "next_slot", "protect_from")


@library.custom_op(
    "tgvkv::attend_step",
    mutates_args=_WRITTEN_BY_ATTENTION,
    schema=f"(Tensor query, Tensor key, Tensor value, {state_schema(*_WRITTEN_BY_ATTENTION)}, SymInt layer, float scale, "
    "str? kv_dtype=None) -> (Tensor, Tensor)",
)
def _attend_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The first half of a step: the output, and this rank's mean attention to the segment, `[B, T]`, 0 behind its end."""
    state, (layer, scale, *held) = read_state(rest)
    output, attention, _ = append_and_attend(query, key, value, state, layer, scale, *held)
    return output, torch.nn.functional.pad(attention, (0, state.slot_position.shape[1] - attention.shape[1]))


@_attend_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, key_arena: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, query.new_empty((query.shape[0], key_arena.shape[2]), dtype=torch.float32)


@library.custom_op(
    "tgvkv::evict_step",
    mutates_args=_WRITTEN_BY_EVICTION,
    schema=f"(Tensor attention, {state_schema(*_WRITTEN_BY_EVICTION)}, SymInt layer, str decode, SymInt sink_tokens) -> ()",
)
def _evict_step(attention: Tensor, *rest: Any) -> None:
    """The second half of a step: chooses by the attention `[B, T]` of all heads."""
    state, (layer, decode, sink_tokens) = read_state(rest)
    start, length = state.segment_start[:, layer], state.segment_len[:, layer] + 1
    positions = segment_positions(state.slot_position, start, length, attention.shape[1])
    evict(attention, positions, state, layer=layer, decode=decode, sink_tokens=sink_tokens)


@_evict_step.register_fake
def _(*_: object) -> None:
    return None


def tensor_parallel_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompactState,
    *,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
    group: str,
    kv_dtype: KVDtype | None = None,
) -> Tensor:
    """[`decode_step`][tgvkv_compile.ops.cache.decode_step.decode_step] where heads are split over ranks.

    Args:
        query: `[B, H, 1, D]`, this rank's heads.
        key: `[B, Hkv, 1, D]`, this rank's heads.
        value: `[B, Hkv, 1, D]`, this rank's heads.
        state: The compact cache: arenas of this rank's heads, all else equal on all ranks.
        layer: As there.
        scale: As there.
        decode: As there.
        sink_tokens: As there.
        group: Name of the process group.
        kv_dtype: As there.

    Returns:
        The attention output of this rank's heads, `[B, H, 1, D]`, dtype of `query`.
    """
    output: Tensor
    output, attention = torch.ops.tgvkv.attend_step(query, key, value, *state, layer, scale, kv_dtype)
    if decode != "keep":  # nothing is chosen then, and nobody needs to know what the others saw
        attention = ranks.mean_over_ranks(attention, query.shape[1], group)
    torch.ops.tgvkv.evict_step(attention, *state, layer, decode, sink_tokens)
    return output
