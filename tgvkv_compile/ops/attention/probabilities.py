"""Attention probabilities in float32, of all heads, whatever the dtype of the model."""

import torch
from torch import Tensor


def attention_probabilities(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of each query head, in float32.

    Query heads are grouped by their key/value head by reshaping `q`; `k` is never repeated. A row that sees nothing is
    all zeros.

    Args:
        q: `[B, H, R, D]`, any floating dtype.
        k: `[B, Hkv, S, D]`, any floating dtype; `Hkv` divides `H`.
        visible: `[B | 1, 1 | H, R, S]` bool, query `r` sees key `s`; None: every query sees every key.
        scale: The factor on the logits.

    Returns:
        `[B, H, R, S]` float32.
    """
    return masked_softmax(_logits(q, k, scale), visible)


def masked_softmax(logits: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last dimension of what is visible (None: all of it), 0 elsewhere and in rows that see nothing."""
    if visible is None:
        return logits.softmax(-1)
    return _visible_softmax(logits, visible).masked_fill(~visible, 0.0)


def _visible_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible: 0 elsewhere, but for rows that see nothing, which are finite."""
    return logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)


def causal_probabilities(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """As [`attention_probabilities`][], for callers that leave out rows that see nothing: one pass over them less."""
    return _visible_softmax(_logits(q, k, scale), visible)


def known_normaliser(q: Tensor, k: Tensor, visible: Tensor, lse: Tensor, scale: float) -> Tensor:
    """As [`attention_probabilities`][], for any subset of the keys: `lse [B, H, R]` is over all of them."""
    return (_logits(q, k, scale) - lse.unsqueeze(3)).exp_().masked_fill_(~visible, 0.0)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`q @ k^T * scale`, `[B, H, R, S]` float32, of `q [B, H, R, D]` and `k [B, Hkv, S, D]`."""
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    grouped = (q.to(torch.float32) * scale).reshape(batch, kv_heads, groups * rows, dim)
    # Not one reshape: for a dynamic `rows` that is `keys` as well, torch.export takes it for a guard that it cannot solve.
    logits = exact_matmul(grouped, k.to(torch.float32).transpose(2, 3))
    return logits.view(batch, kv_heads, groups, rows, k.shape[2]).flatten(1, 2)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 in float32, also where the caller is under autocast, which would round both."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)
