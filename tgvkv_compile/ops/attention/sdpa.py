"""Scaled dot-product attention that also tells the log-sum-exp of each row, where a kernel knows it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

_FLASH_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_FLASH_MAX_DIM = 256
_BIAS_ALIGNMENT = 16  # entries; what `scaled_dot_product_attention` pads the rows of a mask to on CUDA

Kernel = Literal["flash_cpu", "flash", "efficient"]


class AttentionWithLse(NamedTuple):
    """`output [B, H, Q, D]`, and `lse` float32 `[B, H, Q]`, the log-sum-exp of its rows; None where no kernel tells it."""

    output: Tensor
    lse: Tensor | None


def scaled_dot_product_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> AttentionWithLse:
    """`scaled_dot_product_attention`, and what its kernel knows of each row's normaliser.

    Calls the kernel that `scaled_dot_product_attention` itself dispatches to, for its second result: on the CPU its flash
    kernel; on CUDA the flash kernel, or the memory-efficient one where there is a mask or float32. Elsewhere, or where no
    such kernel applies, it calls `scaled_dot_product_attention`, and the log-sum-exp is not known.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, S, D]`; `S` is `Q` in a prefill.
        value: `[B, Hkv, S, D]`.
        attn_mask: `[B | 1, 1 | H, Q, S]`, bool or additive, or None.
        is_causal: As there.
        scale: As there.
    """
    groups = query.shape[1] // key.shape[1]
    kernel = kernel_with_lse(query, key, value, attn_mask)
    if kernel is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=groups != 1
        )
        return AttentionWithLse(output, None)
    if kernel == "flash":  # takes grouped heads as they are
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return AttentionWithLse(output, lse)
    key, value = _repeat(key, groups), _repeat(value, groups)
    if kernel == "efficient":
        bias = None if attn_mask is None else aligned_bias(attn_mask, query)
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        return AttentionWithLse(output, lse.narrow(2, 0, query.shape[2]))  # the kernel rounds the rows up to 32
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=None if attn_mask is None else _additive(attn_mask, query), scale=scale
    )
    return AttentionWithLse(output, lse.to(torch.float32))


def kernel_with_lse(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Kernel | None:
    """Which kernel computes this attention and tells its log-sum-exp; None where none does.

    The conditions are those of `scaled_dot_product_attention` (torch 2.11 to 2.13), a little narrower: head dims that it
    would pad first are left to it. So are devices of ROCm.
    """
    if not query.dtype == key.dtype == value.dtype or not query.shape[3] == key.shape[3] == value.shape[3]:
        return None
    if query.device.type == "cpu":
        return "flash_cpu" if query.dtype in _FLASH_CPU_DTYPES else None
    if query.device.type != "cuda" or torch.version.hip is not None or query.shape[3] % 8 != 0:
        return None
    ampere = _ampere(query.device)
    flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    if flash and attn_mask is None and query.dtype in _HALVES and ampere and query.shape[3] <= _FLASH_MAX_DIM:
        return "flash"
    supported = query.dtype in (torch.float32, torch.float16) or (query.dtype == torch.bfloat16 and ampere)
    return "efficient" if supported and efficient else None


def _ampere(device: torch.device) -> bool:
    """Whether the device has compute capability 8.0 or more."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def aligned_bias(attn_mask: Tensor, query: Tensor) -> Tensor:
    """A mask as the memory-efficient kernel takes it: additive, of all samples and heads, its rows aligned in memory.

    Args:
        attn_mask: `[B | 1, 1 | H, Q, S]`, bool or additive.
        query: `[B, H, Q, D]`.

    Returns:
        `[B, H, Q, S]` of query's dtype; samples and heads that share a mask share its memory.
    """
    additive = _additive(attn_mask, query)
    columns = additive.shape[3]
    filler = additive.new_zeros((*additive.shape[:3], -columns % _BIAS_ALIGNMENT))
    aligned = torch.cat([additive, filler], dim=3).narrow(3, 0, columns)
    return aligned.expand(query.shape[0], query.shape[1], -1, -1)


def _additive(attn_mask: Tensor, query: Tensor) -> Tensor:
    """A mask of query's dtype that is added to the logits."""
    if attn_mask.dtype == torch.bool:
        return torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), float("-inf"))
    return attn_mask.to(query.dtype)


def _repeat(heads: Tensor, groups: int) -> Tensor:
    """`[B, Hkv, N, D]` to `[B, Hkv * groups, N, D]`, each head `groups` times."""
    if groups == 1:
        return heads
    batch, kv_heads, length, dim = heads.shape
    return heads.unsqueeze(2).expand(batch, kv_heads, groups, length, dim).reshape(batch, kv_heads * groups, length, dim)
