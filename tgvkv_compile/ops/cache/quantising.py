"""Keys and values in fewer bytes: codes of 8 or 4 bits, with a scale and a zero point for each token and KV head.

A vector `[D]` of one token and head is stored as `code = round((x - zero) / scale)` and read as `code * scale + zero`; `scale`
and `zero` are float16. A token needs nothing but its own numbers, so appending, overwriting, copying and reordering are what
they are without quantisation. Some channels of keys are far from zero in all tokens, and would take the range of all others.
KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079) therefore give keys scales per channel, which many tokens share; here
keys and queries are [`rotated`][], which spreads such channels over all of them and leaves their products as they are (QuaRot,
arXiv 2404.00456). Values are not rotated.

In four bits the newest tokens lose most: they are what the next token looks at. Caches in `"int4"` hold these in `"int8"` too
(`ops.cache.window`), and a step sees its own tokens as they are.

| `kv_dtype` | codes | `zero` | bytes of 64 channels |
| --- | --- | --- | --- |
| `"int8"` | uint8 `[..., D]`, 0 to 255 | the least value | 64 + 4 |
| `"int4"` | uint8 `[..., D / 2]`, two codes of 0 to 15 in each | the least value | 32 + 4 |
| `"float8_e4m3fn"` | float8_e4m3fn `[..., D]` | 0 | 64 + 4 |

What was measured, and what was not chosen: `docs/quantised-cache.md`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.ops.attention.probabilities import exact_matmul

PARAMETERS = torch.float16
"""Dtype of scales and zero points. With bfloat16's 8 bits the ends of a vector would be clipped by up to half a step of 255."""
_LARGEST_CODE = {"int8": 255.0, "int4": 15.0, "float8_e4m3fn": 448.0}


class Quantised(NamedTuple):
    """Vectors in codes.

    Attributes:
        codes: uint8 `[..., D]` (`"int8"`), uint8 `[..., D / 2]` (`"int4"`: channel `d` in the low four bits, channel
            `d + D / 2` in the high ones) or float8_e4m3fn `[..., D]`.
        scales: float16 `[..., 2]`, each vector's scale and zero point.
    """

    codes: Tensor
    scales: Tensor


def quantise(values: Tensor, kv_dtype: KVDtype) -> Quantised:
    """Vectors to codes, nearest, ties to even; all arithmetic in float32.

    `|x - dequantise(quantise(x))|` is at most `scale / 2`, and what rounding `scale` and `zero` to float16 clips at a vector's
    ends: `largest code * ulp(scale) / 2 + ulp(zero) / 2`. (In float8: `|x| / 16`, or half of its least step.) Zeros come back
    as zeros; a vector of one value that float16 has, as that value (not in float8). A vector with a value that is not finite,
    or whose `scale` or `zero` float16 cannot hold (65504), comes back as NaN throughout: nothing is saturated silently.

    Args:
        values: Keys (rotated) or values `[..., D]`, of any floating dtype.
        kv_dtype: Kind of codes.

    Raises:
        ConfigError: `D` is odd, and codes are to be packed in twos.
    """
    _check(kv_dtype, values.shape[-1])
    values = values.to(torch.float32)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if kv_dtype == "float8_e4m3fn":
        zero = torch.zeros_like(low)
        reach = torch.maximum(high, -low)
    else:
        zero = _rounded(low)
        reach = (high - zero).clamp(min=0.0)
    largest = _LARGEST_CODE[kv_dtype]
    scale = _rounded(reach / largest)
    # A scale that is 0 stands for a vector without a range: every code is 0. One that is not finite makes all of it NaN.
    steps = ((values - zero) / torch.where(scale == 0, 1.0, scale)).nan_to_num(0.0)
    zero = torch.where(torch.isfinite(scale), zero, torch.nan)
    scales = torch.cat([scale, zero], dim=-1).to(PARAMETERS)
    if kv_dtype == "float8_e4m3fn":
        return Quantised(steps.clamp(-largest, largest).to(torch.float8_e4m3fn), scales)
    codes = steps.round().clamp(0.0, largest).to(torch.uint8)
    return Quantised(_pack(codes) if kv_dtype == "int4" else codes, scales)


def dequantise(quantised: Quantised, kv_dtype: KVDtype, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to vectors `[..., D]`: `code * scale + zero` in float32, then rounded to `dtype`.

    Args:
        quantised: What `quantise` gave.
        kv_dtype: As it was given there.
        dtype: Of the result.
    """
    codes = _unpack(quantised.codes) if kv_dtype == "int4" else quantised.codes
    scale, zero = quantised.scales.to(torch.float32).unsqueeze(-1).unbind(-2)
    return (codes.to(torch.float32) * scale + zero).to(dtype)


def bytes_per_entry(kv_dtype: KVDtype | None, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's key, or of its value, in one KV head: codes, scale and zero point.

    Args:
        kv_dtype: Kind of codes; None: not quantised.
        head_dim: D.
        dtype: The model's, of what is not quantised.

    Raises:
        ConfigError: `D` is odd, and codes are to be packed in twos.
    """
    if kv_dtype is None:
        return head_dim * dtype.itemsize
    _check(kv_dtype, head_dim)
    return (head_dim // 2 if kv_dtype == "int4" else head_dim) + 2 * PARAMETERS.itemsize


def rotated(values: Tensor) -> Tensor:
    """Vectors `[..., D]` times a block-diagonal orthogonal matrix that is its own inverse; float32.

    Blocks are Hadamard matrices over the square root of their size, the largest power of two that divides `D` (64 of 64, 16 of
    80, 32 of 96). `rotated(q) @ rotated(k) = q @ k` but for rounding, and `rotated(rotated(x)) = x`.
    """
    size = values.shape[-1] & -values.shape[-1]
    # Made anew each time: graphs cannot hold tensors that were made outside of them.
    index = torch.arange(size, device=values.device)
    parity = index[:, None] & index
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    matrix = (1 - 2 * (parity & 1)).to(torch.float32) / math.sqrt(size)
    blocks = values.to(torch.float32).reshape(*values.shape[:-1], values.shape[-1] // size, size)
    return exact_matmul(blocks, matrix).flatten(-2)


def _check(kv_dtype: KVDtype, head_dim: int) -> None:
    if kv_dtype == "int4" and head_dim % 2:
        raise ConfigError(f"kv_dtype={kv_dtype!r} packs two channels into a byte, and head dim {head_dim} is odd; use 'int8'")


def _rounded(values: Tensor) -> Tensor:
    """As they come back from storage."""
    return values.to(PARAMETERS).to(torch.float32)


def _pack(codes: Tensor) -> Tensor:
    """uint8 `[..., D]` below 16 to `[..., D / 2]`."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    """uint8 `[..., D / 2]` to `[..., D]`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)
