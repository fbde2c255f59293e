"""Weighted sums of attention rows by a Triton kernel: `tgvkv::weigh` on CUDA, where attention gave its log-sum-exp."""

import dataclasses

import torch
from torch import Tensor

from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.kernels.triton.decode import MOST_REGISTERS, next_power, processors
from tgvkv_compile.ops.kernels.triton.weigh_kernels import weigh_attention

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DIM = 256
_MAX_PARTS = 8


@dataclasses.dataclass(frozen=True)
class WeighLaunch:
    """How one sum of attention rows is launched.

    Attributes:
        dim: D, padded to a power of two.
        rows: Rows that a program looks at together.
        columns: Columns that it looks at.
        parts: Programs that share the rows of a block of columns.
        warps: Of the kernel.
    """

    dim: int
    rows: int
    columns: int
    parts: int
    warps: int


def weigh_launch(batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype, processors: int) -> WeighLaunch:
    """The launch for these shapes on a device with so many multiprocessors."""
    padded = max(64, next_power(dim))
    block = (64 if dtype.itemsize == 2 else 32) // (2 if padded > 128 else 1)  # more would not fit into registers
    # Text stands in a few blocks of columns: only parts of the rows give the device enough to do.
    parts = max(1, min(_MAX_PARTS, processors // (batch * heads), -(-rows // (4 * block))))
    return WeighLaunch(padded, block, block, parts, 8 if block * padded >= 64 * 64 else 4)


def fused_applies(rows: AttentionRows) -> bool:
    """Whether the kernel is made for this call; a mask of each head's own goes the plain way."""
    q, mask = rows.q, rows.attn_mask
    alike = q.dtype == rows.k.dtype and q.dtype in _DTYPES and q.shape[3] <= _MAX_DIM
    return rows.lse is not None and alike and (mask is None or mask.shape[1] == 1)


def fused_weigh(weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """The op's sums and seen weights, float32 `[B, K, S]`, as [`weigh`][tgvkv_compile.ops.weighing.weigh].

    Nothing larger than `[B, H, parts, S]` float32 is held, and nothing read on the host.

    Args:
        weights: `[B, K, R]`.
        wanted: bool `[B, S]`, or None.
        rows: The attention; see [`fused_applies`][].
    """
    columns = rows.wanted(wanted)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (rows.q, rows.k))
    each = [_weigh_once(row, columns, rows._replace(q=q, k=k)) for row in weights.to(torch.float32).unbind(1)]
    return torch.stack([sums for sums, _ in each], dim=1), torch.stack([seen for _, seen in each], dim=1)


def _weigh_once(weights: Tensor, wanted: Tensor, attention: AttentionRows) -> tuple[Tensor, Tensor]:
    """Both `[B, S]` of one weight per row, `[B, R]`."""
    q, k, mask, lse = attention.q, attention.k, attention.attn_mask, attention.lse
    assert lse is not None
    first_row = (weights != 0).any(0).to(torch.uint8).argmax()
    batch, heads, rows, dim = q.shape
    columns = k.shape[2]
    launch = weigh_launch(batch, heads, rows, dim, q.dtype, processors(q.device))
    sums = torch.empty((batch, heads, launch.parts, columns), dtype=torch.float32, device=q.device)
    seen = torch.empty((batch, launch.parts, columns), dtype=torch.float32, device=q.device)
    kind, lowest, strides = 0, 0.0, (0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        lowest = 0.0 if kind == 1 else torch.finfo(mask.dtype).min / 2
        strides = (mask.stride(0) if mask.shape[0] != 1 else 0, mask.stride(2), mask.stride(3))
        mask = mask.view(torch.uint8) if kind == 1 else mask
    weigh_attention[(-(-columns // launch.columns), launch.parts, batch * heads)](
        q,
        k,
        lse.contiguous(),
        weights.contiguous(),
        wanted.contiguous().view(torch.uint8),
        first_row,
        sums if mask is None else mask,
        sums,
        seen,
        attention.scale,
        lowest,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        *strides,
        heads,
        heads // k.shape[1],
        rows,
        columns,
        -(-rows // launch.parts),
        D=dim,
        DIM=launch.dim,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        CAUSAL=attention.is_causal,
        MASK=kind,
        WIDE=q.dtype == torch.float32,
        num_warps=launch.warps,
        num_stages=2,
        maxnreg=MOST_REGISTERS if launch.warps == 4 else None,
    )
    return sums.sum(2).mean(1), seen.sum(1)
