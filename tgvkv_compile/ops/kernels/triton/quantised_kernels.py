"""The Triton kernel that attends to quantised rows: what `attend_split` of `decode_kernels` is to numbers of the model's dtype.

No key or value is written out in full. With `k = code * scale + zero`, `q @ k` is `scale * (q @ code) + zero * sum(q)`, and a
weighted sum of values is one of codes, each weighed with `p * scale`, and the sum of `p * zero`. So float32 numbers are
multiplied with codes, which are exact in bfloat16 (`row_kernels.product`). Keys are held rotated; the query is rotated alike.
"""

# Triton's decorators and language have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from tgvkv_compile.ops.kernels.triton.row_kernels import codes_at, product, rotate, scales_at, store_row
from tgvkv_compile.ops.kernels.triton.softmax_kernels import (
    begin_with,
    leave_by_entry,
    leave_by_head,
    part_of_segment,
    see_by_entry,
    see_by_head,
)


@triton.jit
def _entry(position, layer, size):
    """First slot of the window's entry for the token at a position (`ops.cache.window`); windows have `size` entries each."""
    return 2 * (layer * size + position % size)


@triton.jit
def _find_rows(slot, position, new_position, held, layer, size, seen, KIND: tl.constexpr):
    """Where entries are read: from their own slots, or from those of the window if it holds their tokens.

    Args:
        slot: The entries' own, int64 `[BLOCK]`.
        position: Of the entries, int32 `[BLOCK]`.
        new_position: Of the new token. It takes an entry of the window while others read, so that entry is left aside.
        held: Pointer to the sample's `slot_position`.
        layer: Whose window.
        size: Entries of a window.
        seen: Which entries are read at all.
        KIND: The `kv_dtype`.

    Returns:
        Slots int64 `[BLOCK]`, and which of them are the window's: rows of `"int8"`.
    """
    if KIND != "int4":
        return slot, seen
    entry = _entry(position, layer, size)
    whole = seen & (tl.load(held + entry, mask=seen, other=-1) == position) & (entry != _entry(new_position, layer, size))
    return tl.where(whole, entry.to(tl.int64), slot), whole


@triton.jit(do_not_specialize=["layer"])
def attend_rows(
    query,  # [B, H, 1, D]
    key,  # [B, Hkv, 1, D]
    value,  # [B, Hkv, 1, D]
    key_arena,  # uint8 [B, Hkv, T, R]
    value_arena,  # uint8 [B, Hkv, T, R]
    slot_position,  # int32 [B, T]
    segment_start,  # int64 [B, L], and so are the next two
    segment_len,
    next_slot,
    partial_max,  # float32 [B, H, S]
    partial_sum,  # float32 [B, H, S]
    partial_out,  # float32 [B, H, S, D]
    logits,  # float32 [B, H, T]: of slot `start + w` at `w`
    arrived,  # int32 [B]: set to 0 for the next kernel
    layer,
    scale,
    query_batch,
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    kv_heads,
    group,  # H / Hkv
    slots,  # T
    layers,  # L
    splits,  # S
    lengths,  # int64 [B]
    ROW: tl.constexpr,  # R
    D: tl.constexpr,
    DIM: tl.constexpr,  # D, padded to a power of two
    GROUP: tl.constexpr,  # 1, or the group padded to what a matrix product takes
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # bfloat16 numbers that a float32 one is multiplied as
    STORE_LOGITS: tl.constexpr,
    KIND: tl.constexpr,
):
    """One part of one KV head's segment, for all query heads of the group. Grid `(B * Hkv, S + 1)`.

    The programs behind the last part's write the new key and value to their rows: quantising takes a while, and no part is to
    wait for it. Nobody reads those rows, which may be half written. The new token is added to the first part from its own
    tensors, as it is, not as it is stored.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    sample = row // kv_heads
    kv_head = row % kv_heads
    book = sample.to(tl.int64) * layers + layer
    start, new, new_at, first, last = part_of_segment(segment_start, segment_len, next_slot, book, split, splits, BLOCK)
    new_position = tl.load(lengths + sample).to(tl.int32)

    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK)
    in_d = offs_d < D
    keys = key_arena + row.to(tl.int64) * slots * ROW
    values = value_arena + row.to(tl.int64) * slots * ROW
    held = slot_position + sample.to(tl.int64) * slots
    first_head = sample.to(tl.int64) * kv_heads * group + kv_head * group  # of the group, in [B * H]
    before = tl.load(segment_start + sample.to(tl.int64) * layers)
    size = (before // (2 * layers)).to(tl.int32)  # of windows, see `ops.cache.window.sizes_of`

    new_key = tl.load(key + sample.to(tl.int64) * key_batch + kv_head * key_head + offs_d, mask=in_d, other=0.0)
    new_value = tl.load(value + sample.to(tl.int64) * value_batch + kv_head * value_head + offs_d, mask=in_d, other=0.0)
    new_key = new_key.to(tl.float32)
    new_value = new_value.to(tl.float32)
    if split == splits:
        new_key = rotate(new_key, offs_d, D)
        store_row(keys + new * ROW, new_key, offs_d, D, KIND)
        store_row(values + new * ROW, new_value, offs_d, D, KIND)
        if KIND == "int4":
            entry = _entry(new_position, layer, size)
            store_row(keys + entry.to(tl.int64) * ROW, new_key, offs_d, D, "int8")
            store_row(values + entry.to(tl.int64) * ROW, new_value, offs_d, D, "int8")
            if kv_head == 0:
                tl.store(held + entry, new_position)
        if kv_head == 0:
            tl.store(arrived + sample, 0)
        return

    if GROUP == 1:
        q = tl.load(query + sample.to(tl.int64) * query_batch + kv_head * query_head + offs_d, mask=in_d, other=0.0)
        q = q.to(tl.float32) * scale
        new_logit = tl.sum(q * new_key, 0)
        top, total, out = begin_with((offs_n == 0) & (split == 0), new_logit, new_value)
        zeros = tl.zeros_like(total)  # the sum of `p * zero`, which is the same in all channels
        if STORE_LOGITS:
            tl.store(logits + first_head * slots + new_at, new_logit, mask=split == 0)
        q = rotate(q, offs_d, D)
        q_sum = tl.sum(q, 0)
    else:
        offs_g = tl.arange(0, GROUP)
        in_g = offs_g < group
        heads = kv_head * group + offs_g
        q = tl.load(
            query + sample.to(tl.int64) * query_batch + heads[:, None] * query_head + offs_d[None, :],
            mask=in_g[:, None] & in_d[None, :],
            other=0.0,
        )
        q = q.to(tl.float32) * scale
        new_logit = tl.sum(q * new_key[None, :], 1)
        top, total, out = begin_with((offs_g >= 0) & (split == 0), new_logit, new_value)
        zeros = tl.zeros_like(total)
        of_head = logits + (first_head + offs_g) * slots
        if STORE_LOGITS:
            tl.store(of_head + new_at, new_logit, mask=in_g & (split == 0))
        q = rotate(q, offs_d[None, :], D)
        q_sum = tl.sum(q, 1)

    for at in tl.range(first, last, BLOCK):
        offs = at + offs_n
        inside = offs < last
        position = tl.load(held + start + offs, mask=inside, other=-1)
        seen = (position >= 0) & (offs != new_at)
        slot, whole = _find_rows(start + offs, position, new_position, held, layer, size, seen, KIND)
        key_rows = keys + slot * ROW
        value_rows = values + slot * ROW
        key_scale, key_zero = scales_at(key_rows, whole, seen, D, KIND)
        value_scale, value_zero = scales_at(value_rows, whole, seen, D, KIND)
        there = inside[:, None] & in_d[None, :]
        v = codes_at(value_rows[:, None], whole[:, None], offs_d[None, :], there, D, KIND)
        if GROUP == 1:
            k = codes_at(key_rows[:, None], whole[:, None], offs_d[None, :], there, D, KIND)
            s = tl.where(seen, tl.sum(k * q[None, :], 1) * key_scale + q_sum * key_zero, float("-inf"))
            if STORE_LOGITS:
                tl.store(logits + first_head * slots + offs, s, mask=inside & (offs != new_at))
            top, total, fade, p = see_by_entry(top, total, s)
            zeros = zeros * fade + p * value_zero
            out = out * fade[:, None] + (p * value_scale)[:, None] * v
        else:
            there = inside[None, :] & in_d[:, None]
            k = codes_at(key_rows[None, :], whole[None, :], offs_d[:, None], there, D, KIND).to(tl.bfloat16)  # [DIM, BLOCK]
            s = product(q, k, tl.zeros((GROUP, BLOCK), tl.float32), PARTS)
            s = s * key_scale[None, :] + q_sum[:, None] * key_zero[None, :]
            s = tl.where(seen[None, :], s, float("-inf"))
            if STORE_LOGITS:
                tl.store(of_head[:, None] + offs[None, :], s, mask=in_g[:, None] & (inside & (offs != new_at))[None, :])
            top, total, fade, p = see_by_head(top, total, s)
            zeros = zeros * fade + tl.sum(p * value_zero[None, :], 1)
            out = product(p * value_scale[None, :], v.to(tl.bfloat16), out * fade[:, None], PARTS)

    out = tl.where(in_d[None, :], out + zeros[:, None], 0.0)
    if GROUP == 1:
        leave_by_entry(partial_max, partial_sum, partial_out, first_head * splits + split, offs_d, top, total, out, D)
    else:
        at_split = (first_head + offs_g) * splits + split
        leave_by_head(partial_max, partial_sum, partial_out, at_split, in_g, offs_d, top, total, out, D)
