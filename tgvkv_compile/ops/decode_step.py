"""Custom op `tgvkv::decode_step`: append, attend, score and choose the slot to overwrite, for one layer and one token."""

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.decoding import choose_eviction, next_protected
from tgvkv_compile.ops.segments import attend, segment_window
from tgvkv_compile.ops.state import CompactState


@torch.library.custom_op(
    "tgvkv::decode_step",
    mutates_args=("key_arena", "value_arena", "slot_position", "segment_len", "next_slot", "protect_from"),
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
    samples = torch.arange(query.shape[0], device=query.device)
    slot = next_slot[:, layer]
    # Under autocast a step's keys or values may have another dtype than the prompt's.
    key_arena[samples, :, slot] = key[:, :, 0].to(key_arena.dtype)
    value_arena[samples, :, slot] = value[:, :, 0].to(value_arena.dtype)
    slot_position[samples, slot] = lengths.to(slot_position.dtype)

    start, length = segment_start[:, layer], segment_len[:, layer] + 1
    window = segment_window(key_arena, value_arena, slot_position, start, length)
    probabilities, output = attend(query, window, window.positions.ge(0)[:, None, None, :], scale)

    protected = next_protected(window.positions, protect_from[:, layer])
    config = EvictionConfig(decode=decode, sink_tokens=sink_tokens)  # type: ignore[arg-type]
    evicted = choose_eviction(
        probabilities[:, :, 0].mean(1),
        window.positions,
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
    slot_position[samples, freed_or_scrap] = -1
    segment_len[:, layer] = remaining
    next_slot[:, layer] = freed
    protect_from[:, layer] = protected
    return output


@_decode_step.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


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
