"""Custom op `tgvkv::weigh`: weighted sums of attention rows, without ever holding `N x N` attention.

It is the one opaque op that tokens are scored with: a ranking (`ops.policy`) is a plain function of what it gives. Rows are
walked a block at a time, those that weigh nothing are left out, and where each row's log-sum-exp is known only the
columns that are wanted are computed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, library

from tgvkv_compile.ops import kernels
from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.kernels.cpu import weigh as cpu_weigh

# Bytes that one block of attention rows may take. Larger on accelerators, where each block costs kernel launches.
_BLOCK_BYTES = {"cpu": 16 << 20}
_BLOCK_BYTES_ACCELERATOR = 128 << 20
_MIN_BLOCK_ROWS = 16


class Weighed(NamedTuple):
    """Sums over attention rows, averaged over query heads.

    Attributes:
        sums: float32 `[B, K, S]`, `sum_r w[k, r] * A[r, :]`: the attention that each column receives.
        seen: float32 `[B, K, S]`, the sum of the weights of the rows that see it.
    """

    sums: Tensor
    seen: Tensor


Walk = Callable[[Sequence[tuple[Tensor, Tensor | None]]], Sequence[Weighed]]
"""Takes pairs of weights `[B, R]` and wanted columns `[B, S]` (None: all), and gives the sums of each, `K` = 1."""


def block_rows(q: Tensor, columns: int) -> int:
    """Rows of `q [B, H, R, D]` per block, such that the block's attention on `columns` stays within its bytes."""
    batch, heads, _, _ = q.shape
    limit = _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_ACCELERATOR)
    return max(_MIN_BLOCK_ROWS, limit // max(1, 4 * batch * heads * columns))


def add_rows(attention: Tensor, visible: Tensor, weights: Tensor) -> Weighed:
    """Sums a block of rows: `attention` and `visible` `[B | 1, R, C]`, `weights [B, K, R]`.

    Elementwise products, not matmul: TF32 must not round the scores.
    """
    each = [row.unsqueeze(2) for row in weights.to(torch.float32).unbind(1)]
    saw = visible.to(torch.float32)
    return Weighed(
        torch.stack([(attention * row).sum(1) for row in each], dim=1), torch.stack([(saw * row).sum(1) for row in each], dim=1)
    )


def _first_row(weights: Tensor) -> int:
    """The first row that weighs anything in some sample.

    One host read; under CUDA graph capture there can be none, and every row counts.
    """
    if weights.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0
    return int((weights != 0).any(1).any(0).to(torch.uint8).argmax())


def _few_columns(wanted: Tensor) -> Tensor | None:
    """int64 `[C]`, the columns that are wanted of any sample, where it pays to compute these alone."""
    columns = wanted.any(0).nonzero()[:, 0]
    return columns if 2 * columns.shape[0] <= wanted.shape[1] else None


@library.custom_op("tgvkv::weigh", mutates_args=())
def _weigh(
    weights: Tensor,
    wanted: Tensor | None,
    q: Tensor,
    k: Tensor,
    valid: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = AttentionRows(q, k.to(torch.float32), valid, attn_mask, is_causal, scale, lse)
    (batch, many, length), columns = weights.shape, k.shape[2]
    total = Weighed(*(torch.zeros((batch, many, columns), dtype=torch.float32, device=q.device) for _ in range(2)))
    chosen = None if wanted is None or lse is None else _few_columns(wanted)
    block = block_rows(q, columns if chosen is None else chosen.shape[0])
    for start in range(_first_row(weights), length, block):
        end = min(start + block, length)
        part = add_rows(*rows.attention(start, end, chosen), weights[:, :, start:end])
        for accumulated, added in zip(total, part, strict=True):
            if chosen is None:
                accumulated[:, :, : added.shape[2]] += added
            else:
                accumulated[:, :, chosen] += added
    if wanted is not None:
        for accumulated in total:
            accumulated.masked_fill_(~wanted.unsqueeze(1), 0.0)
    return total.sums, total.seen


plain_weigh: Callable[..., tuple[Tensor, Tensor]] = _weigh._init_fn


@_weigh.register_kernel("cpu")
def weigh_on_cpu(weights: Tensor, wanted: Tensor | None, *attention: Any) -> tuple[Tensor, Tensor]:
    """A kernel in C++ where attention gave its log-sum-exp; the plain function where not."""
    rows = AttentionRows(*attention)
    kernel = cpu_weigh.kernel_for(weights, rows)
    return plain_weigh(weights, wanted, *rows) if kernel is None else cpu_weigh.weigh_by(kernel, weights, wanted, rows)


@_weigh.register_kernel("cuda")
def weigh_on_cuda(weights: Tensor, wanted: Tensor | None, *attention: Any) -> tuple[Tensor, Tensor]:
    """A Triton kernel where attention gave its log-sum-exp; the plain function where not."""
    rows = AttentionRows(*attention)
    if kernels.available():
        from tgvkv_compile.ops.kernels.triton import weigh as fused

        if fused.fused_applies(rows):
            return fused.fused_weigh(weights, wanted, rows)
    return plain_weigh(weights, wanted, *rows)


@_weigh.register_fake
def _(weights: Tensor, wanted: Tensor | None, q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    size = (weights.shape[0], weights.shape[1], k.shape[2])
    return q.new_empty(size, dtype=torch.float32), q.new_empty(size, dtype=torch.float32)


def weigh(weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> Weighed:
    """Weighted sums of the rows of head-mean attention, by the opaque op `tgvkv::weigh`; the maths is float32.

    Args:
        weights: `[B, K, R]`, any dtype, finite, at least 0: `K` weights of each row.
        wanted: bool `[B, S]`, valid columns; the sums of other columns are 0. None: all valid columns are wanted.
        rows: The attention.
    """
    result = torch.ops.tgvkv.weigh(weights, wanted, *rows)
    return Weighed(*cast(tuple[Tensor, Tensor], result))
