"""Compact states made by hand."""

import torch
from torch import Tensor

from tgvkv_compile.ops.state import CompactState


def full_state(
    cache: list[tuple[Tensor, Tensor]], *, slots: int, rate: float = 1.0, protect_from: int | None = None
) -> CompactState:
    """All entries of an uncompressed cache, each layer with an equal share of the slots."""
    keys, _ = cache[0]
    batch, heads, length, dim = keys.shape
    layers = len(cache)
    share = (slots - 1) // layers
    key, value = keys.new_zeros(batch, heads, slots, dim), keys.new_zeros(batch, heads, slots, dim)
    position = torch.full((batch, slots), -1, dtype=torch.int32)
    start = torch.arange(layers).mul(share).expand(batch, -1).clone()
    for layer, (k, v) in enumerate(cache):
        at = slice(layer * share, layer * share + length)
        key[:, :, at], value[:, :, at] = k, v
        position[:, at] = torch.arange(length, dtype=torch.int32)
    return CompactState(
        key_arena=key,
        value_arena=value,
        slot_position=position,
        segment_start=start,
        segment_len=torch.full((batch, layers), length),
        next_slot=start + length,
        protect_from=torch.full((batch, layers), length - 1 if protect_from is None else protect_from),
        keep_rate=torch.full((batch, layers), rate),
        lengths=torch.full((batch,), length),
    )
