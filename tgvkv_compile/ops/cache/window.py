"""The newest tokens of a cache in four bits, once more in eight: what the next token looks at most is read more exactly.

KIVI (arXiv 2402.02750) keeps a window of the newest tokens whole. Here each layer has `E` entries in `"int8"` (at most
[`WINDOW`][]), in the first slots of the arena, before all segments; a token at position `p` has entry `p % E` until the one at
`p + E` takes it. [`window_size`][] chooses `E` at prefill; later, where the first segment starts tells it. An entry lies in two
slots: `D + 4` of the `D + 8` bytes of two rows in four bits. `slot_position` of the first is the position of the token in it,
and of the second -1. So what moves, copies or crops arenas moves, copies and crops windows.

The token has a row in its segment as well, so nothing happens when it leaves the window, and eviction knows nothing of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.rows import RowForm, from_rows, to_rows

WINDOW = 16
"""Most of the newest tokens that are held in eight bits as well."""
_SHARE = 16
"""Tokens that a layer keeps for each of them: a window takes an eighth of what its layer's segment does."""


def has_window(kv_dtype: KVDtype | None) -> bool:
    """Whether caches that hold keys and values so have windows."""
    return kv_dtype == "int4"


def window_size(kept: Tensor) -> Tensor:
    """Entries of each layer's window, int64 `[]`: one for so many tokens that a layer keeps on average, from 1 to `WINDOW`.

    Args:
        kept: int64 `[B, L]`, tokens that each layer keeps.
    """
    return (kept.sum(1).amax() // (_SHARE * kept.shape[1])).clamp(min=1, max=WINDOW)


def window_bound(kept: int, num_layers: int, kv_dtype: KVDtype | None) -> int:
    """Most slots that come before the first segment where all layers together keep at most `kept` tokens of a sample."""
    if not has_window(kv_dtype):
        return 0
    return 2 * num_layers * max(1, min(WINDOW, kept // (_SHARE * num_layers)))


def slots_before(kept: Tensor, kv_dtype: KVDtype | None) -> Tensor:
    """Where the first segment of a fresh arena starts, int64 `[]`; `kept` as of [`window_size`][]."""
    return 2 * kept.shape[1] * window_size(kept) if has_window(kv_dtype) else kept.new_zeros(())


def sizes_of(segment_start: Tensor) -> Tensor:
    """Entries of a window by where segments start, int64 `[B, L]`: int64 `[B, 1]`."""
    return segment_start[:, :1] // (2 * segment_start.shape[1])


def _entry(position: Tensor, size: Tensor, layer: int) -> Tensor:
    """First slot of the entry for the tokens at `position [B, Q]`."""
    return 2 * (layer * size + position % size)


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


def write_window(arenas: Sequence[Tensor], key: Tensor, value: Tensor, position: Tensor, size: Tensor, *, layer: int) -> None:
    """Puts tokens into a layer's window, in place: the newest of each sample, as many as there are entries.

    Args:
        arenas: Key arena and value arena `[B, Hkv, T, R]` in `"int4"`, `slot_position` int32 `[B, T]`.
        key: `[B, Hkv, Q, D]`.
        value: `[B, Hkv, Q, D]`.
        position: int64 `[B, Q]`, -1 where there is no token.
        size: int64 `[]` or `[B, 1]`, entries of a window.
        layer: Whose window.
    """
    *parts, slot_position = arenas
    samples = torch.arange(position.shape[0], device=position.device)[:, None]
    last = slot_position.shape[1] - 1  # belongs to no segment
    late = (position >= 0) & (position > position.amax(1, keepdim=True) - size)
    slot = torch.where(late, _entry(position, size, layer), last)
    both = torch.stack([slot, torch.where(late, slot + 1, last)], dim=2).flatten(1)  # [B, 2 Q]
    for arena, values in zip(parts, (key, value), strict=True):
        rows = to_rows(values, "int8", keys=values is key)
        whole = torch.nn.functional.pad(rows, (0, 2 * arena.shape[3] - rows.shape[3]))
        arena[samples, :, both] = whole.reshape(*whole.shape[:2], -1, arena.shape[3]).transpose(1, 2)
    slot_position[samples, slot] = torch.where(late, position, -1).to(slot_position.dtype)


def read_window(
    values: Tensor,
    arena: Tensor,
    slot_position: Tensor,
    positions: Tensor,
    form: RowForm,
    size: Tensor,
    *,
    layer: int,
    keys: bool,
) -> Tensor:
    """Keys or values of a segment, those of the window as this holds them.

    Args:
        values: `[B, Hkv, W, D]`, as the segment's rows say.
        arena: `[B, Hkv, T, R]`.
        slot_position: int32 `[B, T]`.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        form: Of the arena's rows.
        size: int64 `[B, 1]`, entries of a window.
        layer: Whose window.
        keys: Whether they are keys.
    """
    batch, heads, _, dim = values.shape
    # As many slots as the largest window has; behind a smaller one they are not asked for.
    slots = (2 * layer * size + torch.arange(2 * WINDOW, device=size.device)).clamp(max=arena.shape[2] - 1)  # [B, 2 WINDOW]
    rows = arena.gather(2, slots[:, None, :, None].expand(-1, heads, -1, arena.shape[3]))
    eight = RowForm("int8", dim, form.model)
    better = from_rows(rows.reshape(batch, heads, WINDOW, -1)[..., : eight.size], eight, keys=keys).to(values.dtype)
    entry = positions % size
    held = slot_position.gather(1, _entry(positions, size, layer))
    inside = ((held == positions) & (positions >= 0))[:, None, :, None]
    index = entry[:, None, :, None].expand(-1, heads, -1, dim)
    return torch.where(inside, better.gather(2, index), values)
