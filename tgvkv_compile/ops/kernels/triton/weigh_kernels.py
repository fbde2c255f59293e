"""Triton kernel of prefill's thin reductions: weighted sums of attention rows, for a few rows or a few columns."""

# Triton's decorators and language have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def weigh_attention(
    query,  # [B, H, R, D]
    key,  # [B, Hkv, S, D]
    lse,  # float32 [B, H, R]
    weights,  # float32 [B, R]
    wanted,  # uint8 [B, S]: columns to sum up
    first_row,  # int64 []: rows before it weigh nothing
    mask,  # [B | 1, 1, R, S], uint8 or float, or anything where MASK is 0
    sums,  # float32 [B, H, P, S]
    seen,  # float32 [B, P, S]
    scale,
    lowest,  # what an additive mask must be above
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_row,
    mask_column,
    heads,
    group,
    rows,  # R
    columns,  # S
    part,  # rows per program
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # 0: none, 1: bool, 2: additive
    WIDE: tl.constexpr,
):
    """`sum_i w_i exp(q_i k_s * scale - lse_i)` over the rows that see column `s`. Grid `(blocks of S, P, B * H)`.

    A block of columns without a wanted one and a block of rows without weight cost a look and nothing more, so one kernel
    serves the question's rows over all columns and all rows over the columns of text. `seen` gets `sum_i w_i` alone.
    """
    column = tl.program_id(0) * COLUMNS
    share = tl.program_id(1)
    row_of_head = tl.program_id(2)
    sample = row_of_head // heads
    head = row_of_head % heads
    offs_c = column + tl.arange(0, COLUMNS)
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, DIM)
    in_c = offs_c < columns
    in_d = offs_d < D
    wants = tl.load(wanted + sample.to(tl.int64) * columns + offs_c, mask=in_c, other=0) != 0

    first = tl.maximum(share * part, tl.load(first_row).to(tl.int32))
    if CAUSAL:
        first = tl.maximum(first, column)
    last = tl.minimum((share + 1) * part, rows)
    last = tl.where(tl.max(wants.to(tl.int32), 0) > 0, last, first)

    keys = key + sample.to(tl.int64) * key_batch + (head // group).to(tl.int64) * key_head
    k = tl.load(keys + offs_c[None, :].to(tl.int64) * key_row + offs_d[:, None], mask=in_c[None, :] & in_d[:, None], other=0.0)
    if WIDE:
        k = k.to(tl.float32)
    queries = query + sample.to(tl.int64) * query_batch + head.to(tl.int64) * query_head
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    count = tl.zeros((COLUMNS,), dtype=tl.float32)
    for at in range(first, last, ROWS):
        row = at + offs_r
        in_r = row < last
        weight = tl.load(weights + sample.to(tl.int64) * rows + row, mask=in_r, other=0.0)
        if tl.max(weight, 0) > 0.0:
            visible = in_r[:, None] & wants[None, :]
            if CAUSAL:
                visible = visible & (row[:, None] >= offs_c[None, :])
            if MASK != 0:
                place = row[:, None].to(tl.int64) * mask_row + offs_c[None, :].to(tl.int64) * mask_column
                entry = tl.load(mask + sample.to(tl.int64) * mask_batch + place, mask=visible, other=0)
                if MASK == 1:  # noqa: SIM108 (a branch of the compiler, not of the kernel)
                    visible = visible & (entry != 0)
                else:
                    visible = visible & (entry.to(tl.float32) > lowest)
            q = tl.load(
                queries + row[:, None].to(tl.int64) * query_row + offs_d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0
            )
            if WIDE:
                q = q.to(tl.float32)
            normaliser = tl.load(lse + row_of_head.to(tl.int64) * rows + row, mask=in_r, other=0.0)
            logit = tl.dot(q, k, input_precision="ieee") * scale - normaliser[:, None]
            total += tl.sum(tl.where(visible, tl.exp(logit), 0.0) * weight[:, None], 0)
            count += tl.sum(tl.where(visible, weight[:, None], 0.0), 0)
    parts = tl.num_programs(1)
    tl.store(sums + (row_of_head.to(tl.int64) * parts + share) * columns + offs_c, total, mask=in_c)
    tl.store(seen + (sample.to(tl.int64) * parts + share) * columns + offs_c, count, mask=in_c & (head == 0))
