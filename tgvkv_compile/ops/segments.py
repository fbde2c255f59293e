"""Reading a layer's segment out of the arena, and attention over it. Shared by the decode and continuation ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.ops.scoring import attention_probabilities, exact_matmul


class Window(NamedTuple):
    """A layer's entries in slot order: `key`, `value` `[B, Hkv, W, D]`, `positions` int64 `[B, W]`, -1 where empty."""

    key: Tensor
    value: Tensor
    positions: Tensor


def segment_window(key_arena: Tensor, value_arena: Tensor, slot_position: Tensor, start: Tensor, used: Tensor) -> Window:
    """The first `used` slots from `start`, padded to the longest sample.

    On the CPU the width is the longest segment (the lengths are at hand). Elsewhere reading them would stall the
    device, so the width is the whole arena; a fused kernel reads the lengths on the device instead.

    Args:
        key_arena: `[B, Hkv, T, D]`.
        value_arena: `[B, Hkv, T, D]`.
        slot_position: int32 `[B, T]`.
        start: int64 `[B]`.
        used: int64 `[B]`.
    """
    slots = key_arena.shape[2]
    on_cpu = key_arena.device.type == "cpu"
    width = int(used.max()) if on_cpu else slots
    if on_cpu and start.shape[0] == 1:
        first = int(start)
        part = slice(first, first + width)
        return Window(key_arena[:, :, part], value_arena[:, :, part], slot_position[:, part].long())
    index = _slots(start, width, slots)
    positions = segment_positions(slot_position, start, used, width)
    wide = index[:, None, :, None].expand(-1, key_arena.shape[1], -1, key_arena.shape[3])
    return Window(key_arena.gather(2, wide), value_arena.gather(2, wide), positions)


def segment_positions(slot_position: Tensor, start: Tensor, used: Tensor, width: int) -> Tensor:
    """Positions int64 `[B, width]` of the first `used` slots from `start`, -1 behind them; arguments as of `segment_window`."""
    index = _slots(start, width, slot_position.shape[1])
    offset = torch.arange(width, device=start.device)
    return torch.where(offset < used[:, None], slot_position.gather(1, index).long(), -1)


def _slots(start: Tensor, width: int, slots: int) -> Tensor:
    """int64 `[B, width]`, the slots from `start` on; the last slot stands for those that do not exist."""
    return (start[:, None] + torch.arange(width, device=start.device)).clamp(max=slots - 1)


def attend(query: Tensor, window: Window, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over a window, with its probabilities.

    Args:
        query: `[B, H, Q, D]`.
        window: The entries.
        visible: bool `[B, 1, Q|1, W]`.
        scale: What `q @ k` is multiplied by.

    Returns:
        `(probabilities float32 [B, H, Q, W], output [B, H, Q, D] of query's dtype)`.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = window.key.shape[1]
    probabilities = attention_probabilities(query, window.key, visible, scale)
    grouped = probabilities.reshape(batch, kv_heads, heads // kv_heads * queries, -1)
    output = exact_matmul(grouped, window.value.float()).reshape(batch, heads, queries, dim)
    return probabilities, output.to(query.dtype)
