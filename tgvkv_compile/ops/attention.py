"""Scaled dot-product attention that also tells the log-sum-exp of each row, where a kernel knows it."""

import torch
from torch import Tensor

_FLASH_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def scaled_dot_product_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """`scaled_dot_product_attention`, and what its kernel knows of each row's normaliser.

    On the CPU this calls the kernel that `scaled_dot_product_attention` itself dispatches to, for its second result.
    Elsewhere, or where that kernel does not apply, it calls `scaled_dot_product_attention`, and the log-sum-exp is not known.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, S, D]`; `S` is `Q` in a prefill.
        value: `[B, Hkv, S, D]`.
        attn_mask: `[B | 1, 1 | H, Q, S]`, bool or additive, or None.
        is_causal: As there.
        scale: As there.

    Returns:
        `(output [B, H, Q, D], lse float32 [B, H, Q] or None)`.
    """
    groups = query.shape[1] // key.shape[1]
    alike = query.dtype == key.dtype == value.dtype and query.shape[3] == value.shape[3]
    if not alike or query.device.type != "cpu" or query.dtype not in _FLASH_CPU_DTYPES:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=groups != 1
        )
        return output, None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, _repeat(key, groups), _repeat(value, groups), 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output, lse.to(torch.float32)


def _repeat(heads: Tensor, groups: int) -> Tensor:
    """`[B, Hkv, N, D]` to `[B, Hkv * groups, N, D]`, each head `groups` times."""
    if groups == 1:
        return heads
    batch, kv_heads, length, dim = heads.shape
    return heads[:, :, None].expand(batch, kv_heads, groups, length, dim).reshape(batch, kv_heads * groups, length, dim)
