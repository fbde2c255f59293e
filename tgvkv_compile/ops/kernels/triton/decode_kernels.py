"""Triton kernels of a decode step: `attend_split`, then `finish_step`.

Every length is read on the device and the grids depend on shapes alone, so a launch can be recorded in a CUDA graph and
replayed while the segments change. All sums are float32. Offsets into arenas are 64 bits wide.

Why two launches: the head-mean attention needs every head's log-sum-exp over the whole segment, which no program knows
before the last one of its sample has been through its part. The first kernel reads keys and values once and leaves the
logits, `4 * H` bytes per entry (of 2 * Hkv * D numbers); the second reads those. One launch would have to hold all programs
on the device at the same time, which a grid that does not depend on the device cannot promise.
"""

# Triton's decorators and language have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

from tgvkv_compile.ops.kernels.triton.softmax_kernels import (
    LOWEST,
    begin_with,
    leave_by_entry,
    leave_by_head,
    part_of_segment,
    see_by_entry,
    see_by_head,
)

_NOWHERE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _weights_of_half(p, HALF: tl.constexpr):
    """Float32 weights as the sum of two half-precision numbers: a tensor core then loses next to nothing of them."""
    high = p.to(HALF)
    return high, (p - high.to(tl.float32)).to(HALF)


@triton.jit(do_not_specialize=["layer"])
def attend_split(
    query,  # [B, H, 1, D]
    key,  # [B, Hkv, 1, D]
    value,  # [B, Hkv, 1, D]
    key_arena,  # [B, Hkv, T, D]
    value_arena,  # [B, Hkv, T, D]
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
    D: tl.constexpr,
    DIM: tl.constexpr,  # D, padded to a power of two
    GROUP: tl.constexpr,  # 1, or the group padded to what a matrix product takes
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # products of float32 numbers, not of half-precision ones
    STORE_LOGITS: tl.constexpr,
):
    """One part of one KV head's segment, for all query heads of the group. Grid `(B * Hkv, S)`.

    The first part also writes the new key and value to their slot. Nobody reads them from there: other programs may be
    reading that slot meanwhile, and leave what they find aside; the new token is added from its own tensors.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    sample = row // kv_heads
    kv_head = row % kv_heads
    book = sample.to(tl.int64) * layers + layer
    start, new, new_at, first, last = part_of_segment(segment_start, segment_len, next_slot, book, split, splits, BLOCK)

    offs_d = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK)
    in_d = offs_d < D
    arena_row = row.to(tl.int64) * slots
    first_head = sample.to(tl.int64) * kv_heads * group + kv_head * group  # of the group, in [B * H]
    positions = slot_position + sample.to(tl.int64) * slots + start

    new_key = tl.load(key + sample.to(tl.int64) * key_batch + kv_head * key_head + offs_d, mask=in_d, other=0.0)
    new_value = tl.load(value + sample.to(tl.int64) * value_batch + kv_head * value_head + offs_d, mask=in_d, other=0.0)
    new_key = new_key.to(key_arena.dtype.element_ty)
    new_value = new_value.to(value_arena.dtype.element_ty)
    if split == 0:
        target = (arena_row + new) * D + offs_d
        tl.store(key_arena + target, new_key, mask=in_d)
        tl.store(value_arena + target, new_value, mask=in_d)
        if kv_head == 0:
            tl.store(arrived + sample, 0)

    entry = (arena_row + start + first) * D  # of this part's first entry
    keys = key_arena + entry
    values = value_arena + entry
    if GROUP == 1:
        # One query head: every row of the block keeps a softmax of its own, so that the loop reduces over D alone.
        q = tl.load(query + sample.to(tl.int64) * query_batch + kv_head * query_head + offs_d, mask=in_d, other=0.0)
        q = q.to(tl.float32) * scale
        new_logit = tl.sum(q * new_key.to(tl.float32), 0)
        mine = (offs_n == 0) & (split == 0)
        top, total, out = begin_with(mine, new_logit, new_value)
        if STORE_LOGITS:
            tl.store(logits + first_head * slots + new_at, new_logit, mask=split == 0)
        for at in tl.range(first, last, BLOCK):
            offs = at + offs_n
            inside = offs < last
            place = (offs - first)[:, None] * D + offs_d[None, :]
            there = inside[:, None] & in_d[None, :]
            k = tl.load(keys + place, mask=there, other=0.0)
            v = tl.load(values + place, mask=there, other=0.0)
            seen = (tl.load(positions + offs, mask=inside, other=-1) >= 0) & (offs != new_at)
            s = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
            if STORE_LOGITS:
                tl.store(logits + first_head * slots + offs, s, mask=inside & (offs != new_at))
            top, total, fade, p = see_by_entry(top, total, s)
            out = out * fade[:, None] + p[:, None] * v.to(tl.float32)
        leave_by_entry(partial_max, partial_sum, partial_out, first_head * splits + split, offs_d, top, total, out, D)
    else:
        offs_g = tl.arange(0, GROUP)
        in_g = offs_g < group
        heads = kv_head * group + offs_g
        q = tl.load(
            query + sample.to(tl.int64) * query_batch + heads[:, None] * query_head + offs_d[None, :],
            mask=in_g[:, None] & in_d[None, :],
            other=0.0,
        )
        if WIDE:
            q = q.to(tl.float32)
        new_logit = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        mine = (offs_g >= 0) & (split == 0)
        top, total, out = begin_with(mine, new_logit, new_value)
        of_head = logits + (first_head + offs_g) * slots
        if STORE_LOGITS:
            tl.store(of_head + new_at, new_logit, mask=in_g & (split == 0))
        for at in tl.range(first, last, BLOCK):
            offs = at + offs_n
            inside = offs < last
            k = tl.load(
                keys + (offs - first)[None, :] * D + offs_d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0
            )  # [DIM, BLOCK]
            v = tl.load(values + (offs - first)[:, None] * D + offs_d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
            if WIDE:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            seen = (tl.load(positions + offs, mask=inside, other=-1) >= 0) & (offs != new_at)
            s = tl.where(seen[None, :], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))  # [GROUP, BLOCK]
            if STORE_LOGITS:
                kept = in_g[:, None] & (inside & (offs != new_at))[None, :]
                tl.store(of_head[:, None] + offs[None, :], s, mask=kept)
            top, total, fade, p = see_by_head(top, total, s)
            out = out * fade[:, None]
            if WIDE:
                out = tl.dot(p, v, out, input_precision="ieee")
            else:
                high, low = _weights_of_half(p, value_arena.dtype.element_ty)
                out = tl.dot(low, v, tl.dot(high, v, out))
        at_split = (first_head + offs_g) * splits + split
        leave_by_head(partial_max, partial_sum, partial_out, at_split, in_g, offs_d, top, total, out, D)


@triton.jit
def _least(attention, position, at, eligible):
    """Of the eligible entries the one with the least attention, of equals the earlier: `(attention, position, at)`."""
    attention = tl.where(eligible, attention, float("inf"))
    least = tl.min(attention, 0)
    level = eligible & (attention == least)
    earliest = tl.min(tl.where(level, position, _NOWHERE), 0)
    return least, earliest, tl.min(tl.where(level & (position == earliest), at, _NOWHERE), 0)


@triton.jit
def _keep_less(least, earliest, where, attention, position, at):
    """The less of two results of `_least`."""
    less = (attention < least) | ((attention == least) & (position < earliest))
    return tl.where(less, attention, least), tl.where(less, position, earliest), tl.where(less, at, where)


@triton.jit(do_not_specialize=["layer", "sink"])
def finish_step(
    partial_max,  # as `attend_split` left them
    partial_sum,
    partial_out,
    logits,
    arrived,
    found_attention,  # float32 [B, 2, P]: what each program found; entry 0 before, entry 1 at the old `protect_from`
    found_place,  # int32 [B, 5, P]: positions and places of the two, and the first position above
    output,  # [B, H, 1, D]
    slot_position,  # the books: int32 [B, T], int64 [B, L] ...
    segment_start,
    segment_len,
    next_slot,
    protect_from,
    keep_rate,  # float32 [B, L]
    lengths,  # int64 [B]
    layer,
    sink,
    heads,  # H
    slots,  # T
    layers,  # L
    splits,  # S
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,  # heads looked at together
    SPLITS: tl.constexpr,  # S, padded to a power of two
    PROGRAMS: tl.constexpr,  # P
    DECODE: tl.constexpr,  # 0: "ratio", 1: "fixed", 2: "keep"
):
    """Joins the parts, and chooses by the head-mean attention which slot is next. Grid `(B, P)`.

    Each program joins every `P`-th head and looks for the least in its part of the segment. The last to arrive compares
    what all have found and keeps the books. `arrived` counts them; the kernel before set it to 0, so it is right whatever
    became of an earlier step, and in every replay of a CUDA graph.

    Which entries may go depends on the new `protect_from`, which no program knows while it looks: it is the first position
    above the old one. So the entry *at* the old one is looked for apart; it may go if there is one above.
    """
    sample = tl.program_id(0)
    program = tl.program_id(1)
    book = sample.to(tl.int64) * layers + layer
    start = tl.load(segment_start + book)
    length = (tl.load(segment_len + book) + 1).to(tl.int32)
    new = tl.load(next_slot + book)
    new_at = (new - start).to(tl.int32)
    new_position = tl.load(lengths + sample).to(tl.int32)
    protected = tl.load(protect_from + book)
    first_head = sample.to(tl.int64) * heads
    offs_s = tl.arange(0, SPLITS)
    in_s = offs_s < splits
    offs_d = tl.arange(0, DIM)
    in_d = offs_d < D

    for head in range(program, heads, PROGRAMS):
        of_split = (first_head + head) * splits + offs_s
        top = tl.load(partial_max + of_split, mask=in_s, other=LOWEST)
        highest = tl.max(top, 0)
        total = tl.sum(tl.exp(top - highest) * tl.load(partial_sum + of_split, mask=in_s, other=0.0), 0)
        out = tl.zeros((DIM,), dtype=tl.float32)
        for split in range(0, splits):
            at_split = (first_head + head) * splits + split
            weight = tl.exp(tl.load(partial_max + at_split) - highest)
            out += weight * tl.load(partial_out + at_split * D + offs_d, mask=in_d, other=0.0)
        tl.store(output + (first_head + head) * D + offs_d, (out / total).to(output.dtype.element_ty), mask=in_d)

    part = tl.cdiv(tl.cdiv(length, PROGRAMS), BLOCK) * BLOCK
    first = program * part
    last = tl.minimum(first + part, length)
    offs_w = tl.arange(0, BLOCK)
    offs_h = tl.arange(0, HEADS)
    least = float("inf")
    earliest = _NOWHERE
    where = _NOWHERE
    least_edge = float("inf")
    earliest_edge = _NOWHERE
    where_edge = _NOWHERE
    above = _NOWHERE
    for at in range(first, last, BLOCK):
        offs = at + offs_w
        inside = offs < last
        position = tl.load(slot_position + sample.to(tl.int64) * slots + start + offs, mask=inside, other=-1)
        position = tl.where(inside & (offs == new_at), new_position, position)
        above = tl.minimum(above, tl.min(tl.where(position > protected, position, _NOWHERE), 0))
        if DECODE != 2:
            attention = tl.zeros((BLOCK,), dtype=tl.float32)
            for head in range(0, heads, HEADS):
                which = head + offs_h
                in_h = which < heads
                of_split = (first_head + which)[:, None] * splits + offs_s[None, :]
                known = in_h[:, None] & in_s[None, :]
                top = tl.load(partial_max + of_split, mask=known, other=LOWEST)
                highest = tl.max(top, 1)
                total = tl.load(partial_sum + of_split, mask=known, other=0.0) * tl.exp(top - highest[:, None])
                normaliser = highest + tl.log(tl.maximum(tl.sum(total, 1), 1e-30))
                logit = tl.load(
                    logits + (first_head + which)[:, None] * slots + offs[None, :],
                    mask=in_h[:, None] & inside[None, :],
                    other=float("-inf"),
                )
                attention += tl.sum(tl.exp(logit - normaliser[:, None]), 0)
            attention = attention / heads
            attention = tl.where(attention == attention, attention, 0.0)  # a NaN must not keep a slot from being found
            movable = position >= sink
            a, p, w = _least(attention, position, offs, movable & (position < protected))
            least, earliest, where = _keep_less(least, earliest, where, a, p, w)
            a, p, w = _least(attention, position, offs, movable & (position == protected))
            least_edge, earliest_edge, where_edge = _keep_less(least_edge, earliest_edge, where_edge, a, p, w)

    of_sample = found_attention + sample * 2 * PROGRAMS + program
    tl.store(of_sample, least)
    tl.store(of_sample + PROGRAMS, least_edge)
    place = found_place + sample * 5 * PROGRAMS + program
    tl.store(place, earliest)
    tl.store(place + PROGRAMS, where)
    tl.store(place + 2 * PROGRAMS, earliest_edge)
    tl.store(place + 3 * PROGRAMS, where_edge)
    tl.store(place + 4 * PROGRAMS, above)
    tl.debug_barrier()  # every thread's stores come before the release below
    if tl.atomic_add(arrived + sample, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        tl.debug_barrier()
        offs_p = tl.arange(0, PROGRAMS)
        everyone = offs_p >= 0
        seen = found_attention + sample * 2 * PROGRAMS + offs_p
        spot = found_place + sample * 5 * PROGRAMS + offs_p
        moved = tl.min(tl.load(spot + 4 * PROGRAMS), 0)
        moves = moved < _NOWHERE
        a, p, w = _least(tl.load(seen), tl.load(spot), tl.load(spot + PROGRAMS), everyone)
        b, q, x = _least(tl.load(seen + PROGRAMS), tl.load(spot + 2 * PROGRAMS), tl.load(spot + 3 * PROGRAMS), everyone)
        b = tl.where(moves, b, float("inf"))
        q = tl.where(moves, q, _NOWHERE)
        x = tl.where(moves, x, _NOWHERE)
        a, p, w = _keep_less(a, p, w, b, q, x)
        rate = tl.load(keep_rate + book)
        if DECODE == 0:
            due = length.to(tl.float32) - (new_position + 1).to(tl.float32) * rate >= 1.0
        elif DECODE == 1:
            due = rate != 1.0
        else:
            due = length < 0
        evicts = due & (w < _NOWHERE)
        tl.store(slot_position + sample.to(tl.int64) * slots + new, new_position)
        tl.debug_barrier()  # the slot that goes may be the new one's
        freed = start + tl.where(evicts, w, length)
        tl.store(slot_position + sample.to(tl.int64) * slots + freed, -1, mask=evicts)
        tl.store(segment_len + book, (length - evicts.to(tl.int32)).to(tl.int64))
        tl.store(next_slot + book, freed)
        tl.store(protect_from + book, tl.where(moves, moved.to(tl.int64), protected))
