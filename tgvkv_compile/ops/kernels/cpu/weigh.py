"""Calls the kernel of `tgvkv::weigh` on CPUs."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.kernels.cpu.compiled import kernel, record

_SIZES = (
    *("batch", "heads", "kv_heads", "dim", "rows", "columns"),
    *("query_sample", "query_head", "query_row", "key_sample", "key_head", "key_row"),
    *("lse_sample", "lse_head", "lse_row", "mask_sample", "mask_row", "mask_column"),
    *("is_causal", "threads"),
)
_POINTERS = ("query", "key", "lse", "weights", "wanted", "mask", "sums", "seen")


_Weighing = record(_SIZES, _POINTERS)
"""`struct Weighing` of the source."""


def kernel_for(weights: Tensor, rows: AttentionRows) -> Callable[..., None] | None:
    """The kernel, if there is one for these arguments of the op.

    It wants one weight per row, the rows' log-sum-exp, queries and keys of one dtype, and a mask that is bool and the same for
    all heads, if there is one.
    """
    alike = rows.q.dtype == rows.k.dtype and rows.q.stride(3) == rows.k.stride(3) == 1
    if rows.lse is None or weights.shape[1] != 1 or not alike:
        return None
    mask = rows.attn_mask
    return kernel("weigh", rows.q.dtype) if mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1) else None


def weigh_by(kernel: Callable[..., None], weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """The op by `kernel`, which [`kernel_for`][] gave for these arguments."""
    assert rows.lse is not None
    (batch, heads, count, dim), columns = rows.q.shape, rows.k.shape[2]
    sums, seen = (torch.zeros((batch, 1, columns), dtype=torch.float32) for _ in range(2))
    sizes = [batch, heads, rows.k.shape[1], dim, count, columns, *rows.q.stride()[:3], *rows.k.stride()[:3], *rows.lse.stride()]
    if rows.attn_mask is None:
        sizes += [0, 0, 0]
    else:
        sample, _, row, column = rows.attn_mask.expand(batch, 1, count, columns).stride()
        sizes += [sample, row, column]
    sizes += [int(rows.is_causal), torch.get_num_threads()]
    given = weights[:, 0].to(torch.float32).contiguous()
    tensors = (rows.q, rows.k, rows.lse, given, rows.wanted(wanted).contiguous(), rows.attn_mask, sums, seen)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    kernel(ctypes.byref(_Weighing(*sizes, rows.scale, *pointers)))
    return sums, seen
