"""Calls the kernel of `tgvkv::weigh` on CPUs."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tgvkv_compile.ops.kernels.cpu.library import kernel

_SIZES = (
    *("batch", "heads", "kv_heads", "dim", "rows", "columns"),
    *("query_sample", "query_head", "query_row", "key_sample", "key_head", "key_row"),
    *("lse_sample", "lse_head", "lse_row", "mask_sample", "mask_row", "mask_column"),
    *("is_causal", "threads"),
)
_POINTERS = ("query", "key", "lse", "weights", "wanted", "valid", "mask", "sums", "seen")


class _Weighing(ctypes.Structure):
    """`struct Weighing` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def kernel_for(
    weights: Tensor, q: Tensor, k: Tensor, attn_mask: Tensor | None, lse: Tensor | None
) -> Callable[..., None] | None:
    """The kernel, if there is one for these arguments of the op.

    It wants one weight per row, the rows' log-sum-exp, queries and keys of one dtype, and a mask that is bool and the same for
    all heads, if there is one.
    """
    plain = lse is None or weights.shape[1] != 1 or q.dtype != k.dtype or q.stride(3) != 1 or k.stride(3) != 1
    masked = attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1] != 1)
    return None if plain or masked else kernel("weigh", q.dtype)


def weigh_by(
    kernel: Callable[..., None],
    weights: Tensor,
    wanted: Tensor | None,
    q: Tensor,
    k: Tensor,
    valid: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The op by `kernel`, which [`kernel_for`][] gave for these arguments."""
    (batch, heads, rows, dim), columns = q.shape, k.shape[2]
    sums, seen = (torch.zeros((batch, 1, columns), dtype=torch.float32) for _ in range(2))
    given = weights[:, 0].to(torch.float32).contiguous()
    asked = None if wanted is None else wanted.contiguous()
    valid = valid.contiguous()
    sizes = [batch, heads, k.shape[1], dim, rows, columns, *q.stride()[:3], *k.stride()[:3], *lse.stride()]
    if attn_mask is None:
        sizes += [0, 0, 0]
    else:
        sample, _, row, column = attn_mask.expand(batch, 1, rows, columns).stride()
        sizes += [sample, row, column]
    sizes += [int(is_causal), torch.get_num_threads()]
    tensors = (q, k, lse, given, asked, valid, attn_mask, sums, seen)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    kernel(ctypes.byref(_Weighing(*sizes, scale, *pointers)))
    return sums, seen
