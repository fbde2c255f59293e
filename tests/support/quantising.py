"""The slow, obvious way to quantise: one vector, one group, one channel after the other."""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = {"int8": 255, "int4": 15}


def slowly(vector: Any, kind: str) -> tuple[list[float], float, float]:
    """Codes, scale and zero point of a float32 numpy vector."""
    one = np.float32
    if kind == "float8_e4m3fn":
        zero, reach, largest = one(0), max(abs(x) for x in vector), one(448)
    else:
        zero, largest = one(np.float16(min(vector))), one(LEVELS[kind])
        reach = max(one(max(vector) - zero), one(0))
    scale = one(np.float16(one(reach) / largest))
    codes = []
    for x in vector:
        step = one(one(x - zero) / (scale if scale else one(1)))
        if kind == "float8_e4m3fn":
            codes.append(nearest_float8(float(min(max(step, -largest), largest))))
        else:
            codes.append(min(max(float(np.rint(step)), 0.0), float(largest)))
    return codes, float(scale), float(zero)


def nearest_float8(x: float) -> float:
    """With four bits of significance, exponents from -6 on; ties to even."""
    exponent = max(math.floor(math.log2(abs(x))), -6) if x else -6
    unit = 2.0 ** (exponent - 3)
    return round(x / unit) * unit


def as_held(values: Tensor, kv_dtype: str, *, keys: bool) -> Tensor:
    """What a cache gives back of keys or values `[..., D]`, float32."""
    dim = values.shape[-1]
    turn = hadamard(dim) if keys else np.eye(dim, dtype=np.float32)
    rows = values.detach().float().reshape(-1, dim).numpy() @ turn
    return torch.from_numpy(np.stack([_read(row.tobytes(), kv_dtype) for row in rows]) @ turn).reshape(values.shape)


@functools.lru_cache(maxsize=100_000)
def _read(row: bytes, kv_dtype: str) -> Any:
    """A float32 vector as it comes back; of a growing cache most are asked for again."""
    codes, scale, zero = slowly(np.frombuffer(row, dtype=np.float32), kv_dtype)
    return np.float32(scale) * np.array(codes, dtype=np.float32) + np.float32(zero)


def hadamard(dim: int) -> Any:
    """`[dim, dim]`, of blocks of the largest power of two that divides `dim`."""
    block = 1
    while dim % (2 * block) == 0:
        block *= 2
    small = np.ones((1, 1), dtype=np.float32)
    while len(small) < block:
        small = np.block([[small, small], [small, -small]])
    return np.kron(np.eye(dim // block), small * np.float32(block**-0.5)).astype(np.float32)
