"""The newest tokens of a cache in four bits, once more in eight: what the next token looks at most is read more exactly.

KIVI (arXiv 2402.02750) keeps a window of the newest tokens whole. Here each layer has [`WINDOW`][] entries in `"int8"`, in the
first slots of the arena, before all segments; a token at position `p` has entry `p % WINDOW` until the one at `p + WINDOW`
takes it. An entry lies in two slots: `D + 4` of the `D + 8` bytes of two rows in four bits. `slot_position` of the first is
the position of the token in it, and of the second -1. So what moves, copies or crops arenas moves, copies and crops windows.

The token has a row in its segment as well, so nothing happens when it leaves the window, and eviction knows nothing of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.rows import RowForm, from_rows, to_rows

WINDOW = 16
"""Newest tokens that are held in eight bits as well."""
_SLOTS = 2 * WINDOW
"""Of a layer's window."""


def has_window(kv_dtype: KVDtype | None) -> bool:
    """Whether caches that hold keys and values so have windows."""
    return kv_dtype == "int4"


def window_slots(kv_dtype: KVDtype | None, num_layers: int) -> int:
    """Slots before the first segment."""
    return num_layers * _SLOTS if has_window(kv_dtype) else 0


def newest(key: Tensor, value: Tensor, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last `WINDOW` tokens of each sample, as far as they are there.

    Args:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        positions: int64 `[B, N]`, in any order, -1 where there is no token.
        lengths: int64 `[B]`, tokens so far.

    Returns:
        Keys and values `[B, Hkv, WINDOW, D]` and their positions int64 `[B, WINDOW]`, -1 where there is none.
    """
    wanted = lengths[:, None] - WINDOW + torch.arange(WINDOW, device=lengths.device)
    found = (positions[:, None, :] == wanted[:, :, None]) & (wanted >= 0)[:, :, None]  # [B, WINDOW, N]
    column = found.to(torch.int64).argmax(2)[:, None, :, None]
    there = torch.where(found.any(2), wanted, -1)
    picked = [x.gather(2, column.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value)]
    return picked[0], picked[1], there


def write_window(arenas: Sequence[Tensor], key: Tensor, value: Tensor, position: Tensor, *, layer: int) -> None:
    """Puts tokens into a layer's window, in place: the newest of each sample, at most `WINDOW`.

    Args:
        arenas: Key arena and value arena `[B, Hkv, T, R]` in `"int4"`, `slot_position` int32 `[B, T]`.
        key: `[B, Hkv, Q, D]`.
        value: `[B, Hkv, Q, D]`.
        position: int64 `[B, Q]`, -1 where there is no token.
        layer: Whose window.
    """
    *parts, slot_position = arenas
    samples = torch.arange(position.shape[0], device=position.device)[:, None]
    last = slot_position.shape[1] - 1  # belongs to no segment
    late = (position >= 0) & (position > position.amax(1, keepdim=True) - WINDOW)
    slot = torch.where(late, layer * _SLOTS + 2 * (position % WINDOW), last)
    both = torch.stack([slot, torch.where(late, slot + 1, last)], dim=2).flatten(1)  # [B, 2 Q]
    for arena, values in zip(parts, (key, value), strict=True):
        rows = to_rows(values, "int8", keys=values is key)
        whole = torch.nn.functional.pad(rows, (0, 2 * arena.shape[3] - rows.shape[3]))
        arena[samples, :, both] = whole.reshape(*whole.shape[:2], -1, arena.shape[3]).transpose(1, 2)
    slot_position[samples, slot] = torch.where(late, position, -1).to(slot_position.dtype)


def read_window(
    values: Tensor, arena: Tensor, slot_position: Tensor, positions: Tensor, form: RowForm, *, layer: int, keys: bool
) -> Tensor:
    """Keys or values of a segment, those of the window as this holds them.

    Args:
        values: `[B, Hkv, W, D]`, as the segment's rows say.
        arena: `[B, Hkv, T, R]`.
        slot_position: int32 `[B, T]`.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        form: Of the arena's rows.
        layer: Whose window.
        keys: Whether they are keys.
    """
    first, dim = layer * _SLOTS, values.shape[3]
    entries = arena[:, :, first : first + _SLOTS].reshape(*arena.shape[:2], WINDOW, -1)  # [B, Hkv, WINDOW, 2 R]
    eight = RowForm("int8", dim, form.model)
    better = from_rows(entries[..., : eight.size], eight, keys=keys).to(values.dtype)
    entry = positions % WINDOW
    held = slot_position[:, first : first + _SLOTS : 2].gather(1, entry)
    inside = ((held == positions) & (positions >= 0))[:, None, :, None]
    index = entry[:, None, :, None].expand(-1, values.shape[1], -1, dim)
    return torch.where(inside, better.gather(2, index), values)
