"""What the kernels that attend to a part of a segment share: where it lies, and a softmax that grows block by block.

Of what it has seen, a program keeps the highest logit (`top`), the sum of weights `exp(logit - top)` (`total`) and that of
weighted values (`out`), all float32. It has `rows` of each: one per query head; or, for a lone head, one per entry of a block,
so that nothing is reduced over entries before the end.
"""

# Triton's decorators and language have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # stands for -inf in running maxima: differences of it are no NaN


@triton.jit
def part_of_segment(segment_start, segment_len, next_slot, book, split, splits, BLOCK: tl.constexpr):
    """One of the parts that a segment is looked at in, the new token's entry counted.

    Returns the segment's first slot and the new token's (int64), and as offsets from the first (int32) the new token's, the
    part's first and what is behind its last.
    """
    start = tl.load(segment_start + book)
    length = (tl.load(segment_len + book) + 1).to(tl.int32)
    new = tl.load(next_slot + book)
    part = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = split * part
    return start, new, (new - start).to(tl.int32), first, tl.minimum(first + part, length)


@triton.jit
def begin_with(mine, logit, value):
    """`top`, `total` and `out [rows, DIM]`: of the new token alone in the rows that are `mine`, of nothing in the others."""
    top = tl.where(mine, logit, LOWEST)
    total = tl.where(mine, 1.0, 0.0)
    return top, total, tl.where(mine[:, None], value.to(tl.float32)[None, :], 0.0)


@triton.jit
def see_by_entry(top, total, s):
    """A lone head sees logits `s [BLOCK]`: the new `top` and `total`, what `out` fades by, and the weights."""
    higher = tl.maximum(top, s)
    fade = tl.exp(top - higher)
    p = tl.exp(s - higher)
    return higher, total * fade + p, fade, p


@triton.jit
def see_by_head(top, total, s):
    """A group of heads sees logits `s [GROUP, BLOCK]`; returns what `see_by_entry` does."""
    higher = tl.maximum(top, tl.max(s, 1))
    fade = tl.exp(top - higher)
    p = tl.exp(s - higher[:, None])
    return higher, total * fade + tl.sum(p, 1), fade, p


@triton.jit
def leave_by_entry(partial_max, partial_sum, partial_out, at, offs_d, top, total, out, D: tl.constexpr):
    """Joins a lone head's rows and stores them as the part `at` of `[B * H * S]`."""
    highest = tl.max(top, 0)
    fade = tl.exp(top - highest)
    tl.store(partial_max + at, highest)
    tl.store(partial_sum + at, tl.sum(total * fade, 0))
    tl.store(partial_out + at * D + offs_d, tl.sum(out * fade[:, None], 0), mask=offs_d < D)


@triton.jit
def leave_by_head(partial_max, partial_sum, partial_out, at, in_g, offs_d, top, total, out, D: tl.constexpr):
    """Stores a group's rows as the parts `at [GROUP]` of `[B * H * S]`."""
    tl.store(partial_max + at, top, mask=in_g)
    tl.store(partial_sum + at, total, mask=in_g)
    tl.store(partial_out + at[:, None] * D + offs_d[None, :], out, mask=in_g[:, None] & (offs_d < D)[None, :])
