"""The rows of a quantised cache, number by number in numpy: what `ops.cache.rows` must agree with."""

import numpy as np
import torch
from torch import Tensor


def as_held(values: Tensor, kv_dtype: str, *, keys: bool) -> Tensor:
    """What a cache gives back of keys or values `[..., D]`, float32."""
    flat = values.detach().to(torch.float32).reshape(-1, values.shape[-1]).numpy()
    read = [_row(row, kv_dtype, keys=keys) for row in flat]
    return torch.from_numpy(np.stack(read)).reshape(values.shape)


def _row(row: np.ndarray, kv_dtype: str, *, keys: bool) -> np.ndarray:
    if kv_dtype == "int8":
        return _group(row, 255)
    if kv_dtype == "int4":
        turn = hadamard(len(row)) if keys else np.eye(len(row), dtype=np.float32)
        parts = np.split((row[None] @ turn)[0], _groups(len(row)))
        return (np.concatenate([_group(part, 15) for part in parts])[None] @ turn)[0]
    scale = np.float32(np.float16(np.abs(row).max() / np.float32(448)))
    scaled = torch.from_numpy(np.clip(row / (scale or np.float32(1)), -448, 448)).to(torch.float8_e4m3fn)
    return scaled.float().numpy() * scale


def _group(part: np.ndarray, levels: int) -> np.ndarray:
    low, high = np.clip(part.min(), -65504, 65504), np.clip(part.max(), -65504, 65504)
    zero, scale = np.float32(np.float16(low)), np.float32(np.float16((high - low) / np.float32(levels)))
    codes = np.clip(np.round((part - zero) / (scale or np.float32(1))), 0, levels)
    return (zero + scale * codes).astype(np.float32)


def _groups(dim: int) -> int:
    return max(count for count in range(1, max(1, dim // 32) + 1) if dim % count == 0)


def hadamard(dim: int) -> np.ndarray:
    """`[dim, dim]`, of blocks of the largest power of two that divides `dim`."""
    block = 1
    while dim % (2 * block) == 0:
        block *= 2
    small = np.ones((1, 1), dtype=np.float32)
    while len(small) < block:
        small = np.block([[small, small], [small, -small]])
    return np.kron(np.eye(dim // block), small * np.float32(block**-0.5)).astype(np.float32)
