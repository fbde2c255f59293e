"""Attention over a layer's segment of the arena. Shared by the decode and continuation ops."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.attention.probabilities import attention_probabilities, exact_matmul, masked_softmax
from tgvkv_compile.ops.cache.rows import RowForm, from_rows, to_rows
from tgvkv_compile.ops.cache.window import has_window, read_window, sizes_of, write_window
from tgvkv_compile.ops.state import CompactState


class NewTokens(NamedTuple):
    """What a step brings. Its tokens see each other as they are, and later steps see what the arena holds of them.

    Attributes:
        key: `[B, Hkv, Q, D]`.
        value: `[B, Hkv, Q, D]`.
        position: int64 `[B, Q]`, -1 for padding.
        slot: int64 `[B, Q]`, where they go; padding goes to the last one, which belongs to no segment.
        layer: Whose segment it is.
        kv_dtype: How the arenas hold keys and values, see `EvictionConfig`.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    slot: Tensor
    layer: int
    kv_dtype: KVDtype | None = None


def append(state: CompactState, new: NewTokens) -> None:
    """Writes new tokens and their positions to their slots, in place."""
    samples = torch.arange(new.slot.shape[0], device=new.slot.device)[:, None]
    for arena, tensor in ((state.key_arena, new.key), (state.value_arena, new.value)):
        rows = to_rows(tensor.transpose(1, 2), new.kv_dtype, keys=arena is state.key_arena)
        # Under autocast a step's keys or values may have another dtype than the prompt's.
        arena[samples, :, new.slot] = rows.to(arena.dtype)
    state.slot_position[samples, new.slot] = new.position.to(state.slot_position.dtype)
    if has_window(new.kv_dtype):
        write_window(state[:3], new.key, new.value, new.position, sizes_of(state.segment_start), layer=new.layer)


class Attended(NamedTuple):
    """What queries saw of a segment's `W` slots.

    Attributes:
        output: `[B, H, Q, D]`, dtype of the query.
        attention: float32 `[B, Q, W]`, averaged over heads; 0 where empty.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
    """

    output: Tensor
    attention: Tensor
    positions: Tensor


def attend_segment(
    query: Tensor,
    state: CompactState,
    start: Tensor,
    used: Tensor,
    scale: float,
    new: NewTokens,
    sees: Callable[[Tensor], Tensor] | None = None,
) -> Attended:
    """Attention to the first `used` slots from `start`, all of them occupied.

    On the CPU each sample attends to its own slots where they lie: the lengths are at hand, and gathering the segments of a
    batch into one tensor took as long as all the rest. Elsewhere reading lengths would stall the device, so every sample
    attends to the whole arena from `start` on, with a mask.

    Args:
        query: `[B, H, Q, D]`.
        state: Its arenas and `slot_position` are read, no more.
        start: int64 `[B]`.
        used: int64 `[B]`.
        scale: What `q @ k` is multiplied by.
        new: What [`append`][] wrote to them in this step.
        sees: Given positions `[B, W]`, tells which of them each query sees, bool `[B, Q, W]`; all that are occupied by default.
    """
    key_arena, value_arena, slot_position = state.key_arena, state.value_arena, state.slot_position
    if key_arena.device.type != "cpu":
        width = key_arena.shape[2]
        positions = segment_positions(slot_position, start, used, width)
        visible = (positions >= 0)[:, None] if sees is None else sees(positions)
        index = _slots(start, width, width)[:, None, :, None].expand(-1, key_arena.shape[1], -1, key_arena.shape[3])
        column = new.slot - start[:, None]
        key = _read(key_arena.gather(2, index), state, positions, new, column, keys=True)
        value = _read(value_arena.gather(2, index), state, positions, new, column, keys=False)
        output, attention = attend(query, key, value, visible[:, None], scale)
        return Attended(output, attention, positions)
    return _attend_apart(query, state, start, used, scale, new, sees)


def _read(rows: Tensor, state: CompactState, positions: Tensor, new: NewTokens, column: Tensor, *, keys: bool) -> Tensor:
    """Rows `[B, Hkv, W, R]` of a segment as keys or values `[B, Hkv, W, D]`.

    Args:
        rows: Of the key arena or the value arena.
        state: Has the arenas.
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        new: They are read as they are.
        column: int64 `[B, Q]`, which of the entries are the new ones.
        keys: Whether they are keys.
    """
    if new.kv_dtype is None:
        return rows
    own = (new.key if keys else new.value).to(torch.float32)
    form = RowForm(new.kv_dtype, own.shape[3], torch.float32)
    values = from_rows(rows, form, keys=keys)
    if has_window(new.kv_dtype):
        arena = state.key_arena if keys else state.value_arena
        size = sizes_of(state.segment_start)
        values = read_window(values, arena, state.slot_position, positions, form, size, layer=new.layer, keys=keys)
    return values.scatter(2, column[:, None, :, None].expand(own.shape), own)


def _attend_apart(
    query: Tensor,
    state: CompactState,
    start: Tensor,
    used: Tensor,
    scale: float,
    new: NewTokens,
    sees: Callable[[Tensor], Tensor] | None,
) -> Attended:
    """[`attend_segment`][] sample by sample, on the slots where they lie; only logits are padded to the longest sample."""
    batch, heads, queries, dim = query.shape
    kv_heads = state.key_arena.shape[1]
    lengths = used.tolist()
    slots = [slice(first, first + length) for first, length in zip(start.tolist(), lengths, strict=True)]
    positions = segment_positions(state.slot_position, start, used, max(lengths))
    grouped = (query.to(torch.float32) * scale).reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    logits = grouped.new_full((*grouped.shape[:3], positions.shape[1]), torch.finfo(torch.float32).min)
    output = torch.empty_like(grouped)
    with torch.autocast(query.device.type, enabled=False):  # it would round both operands
        for sample, part in enumerate(slots):
            key = _read_sample(state, sample, part, positions, new, keys=True)
            logits[sample, ..., : lengths[sample]] = torch.bmm(grouped[sample], key.transpose(1, 2))
        probabilities = masked_softmax(
            logits.view(batch, heads, queries, -1), None if sees is None else sees(positions)[:, None]
        )
        shares = probabilities.view(logits.shape)
        for sample, part in enumerate(slots):
            value = _read_sample(state, sample, part, positions, new, keys=False)
            torch.bmm(shares[sample, ..., : lengths[sample]], value, out=output[sample])
    return Attended(output.view(query.shape).to(query.dtype), probabilities.mean(1), positions)


def _read_sample(state: CompactState, sample: int, part: slice, positions: Tensor, new: NewTokens, *, keys: bool) -> Tensor:
    """One sample's keys or values of the slots `part`, which hold `positions [B, W]`; float32 `[Hkv, W, D]`."""
    rows = (state.key_arena if keys else state.value_arena)[sample, :, part]
    if new.kv_dtype is None:
        return rows.to(torch.float32)
    column = new.slot[sample] - part.start
    inside = column < part.stop - part.start
    one = slice(sample, sample + 1)
    mine = new._replace(key=new.key[one, :, inside], value=new.value[one, :, inside])
    its = CompactState(*(tensor[one] for tensor in state))
    return _read(rows[None], its, positions[one, : rows.shape[1]], mine, column[None, inside], keys=keys)[0]


def segment_positions(slot_position: Tensor, start: Tensor, used: Tensor, width: int) -> Tensor:
    """Positions int64 `[B, width]` of the first `used` slots from `start`, -1 behind them; arguments as of `attend_segment`."""
    index = _slots(start, width, slot_position.shape[1])
    offset = torch.arange(width, device=start.device)
    return torch.where(offset < used[:, None], slot_position.gather(1, index).long(), -1)


def _slots(start: Tensor, width: int, slots: int) -> Tensor:
    """int64 `[B, width]`, the slots from `start` on; the last slot stands for those that do not exist."""
    return (start[:, None] + torch.arange(width, device=start.device)).clamp(max=slots - 1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, with what it pays to each key.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, W, D]`.
        value: `[B, Hkv, W, D]`.
        visible: bool `[B, 1, Q|1, W]`; None: everything is.
        scale: What `q @ k` is multiplied by.

    Returns:
        `(output [B, H, Q, D] of query's dtype, attention float32 [B, Q, W] averaged over heads)`.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    probabilities = attention_probabilities(query, key, visible, scale)
    grouped = probabilities.reshape(batch, kv_heads, heads // kv_heads * queries, -1)
    output = exact_matmul(grouped, value.float()).reshape(batch, heads, queries, dim)
    return output.to(query.dtype), probabilities.mean(1)
