"""How an arena holds a key or value of one token and head: a row, of the model's own numbers or of codes and their scales.

A quantised row is bytes: the codes, and behind them what they are read with. So an arena is one tensor whatever it holds, and
all that moves whole rows (beams, copies, growth, `crop`) knows nothing of it. What writes to and reads from one goes through
[`to_rows`][] and [`from_rows`][].
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.ops.attention.probabilities import exact_matmul


@dataclasses.dataclass(frozen=True)
class RowForm:
    """What rows look like.

    Attributes:
        kv_dtype: As in `EvictionConfig`; None: the model's own numbers.
        dim: D.
        model: dtype of the model's keys, or values.
    """

    kv_dtype: str | None
    dim: int
    model: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, kv_dtype: str | None) -> "RowForm":
        """The form in which a tensor `[..., D]` is held."""
        return cls(kv_dtype, tensor.shape[-1], tensor.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of an arena."""
        return self.model if self.kv_dtype is None else torch.uint8

    @property
    def size(self) -> int:
        """Elements of a row: an arena's last dimension."""
        return self.dim if self.kv_dtype is None else row_bytes(self.kv_dtype, self.dim)

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return self.size * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Those of them that hold no codes."""
        return 0 if self.kv_dtype is None else scale_bytes(self.kv_dtype, self.dim)

    @property
    def code_bytes(self) -> int:
        """Those of them that do."""
        return self.bytes - self.scale_bytes


class KVForms(NamedTuple):
    """The forms of keys and of values."""

    key: RowForm
    value: RowForm

    @classmethod
    def plain(cls, key: Tensor, value: Tensor) -> "KVForms":
        """Of keys and values `[..., D]` that are held as they are."""
        return cls(RowForm.of(key, None), RowForm.of(value, None))

    @property
    def bytes(self) -> int:
        """Bytes of one token's key and value of one head."""
        return self.key.bytes + self.value.bytes

    @property
    def unquantised_bytes(self) -> int:
        """What it would be in the model's own dtype."""
        return sum(form.dim * form.model.itemsize for form in self)


class Scheme(NamedTuple):
    """How numbers become codes.

    Attributes:
        levels: Codes are 0 to `levels`; None: they are float8 numbers.
        group: About as many channels share a scale; None: all of a row.
        rotates: Whether keys are rotated before.
    """

    levels: int | None
    group: int | None
    rotates: bool


SCHEMES = {
    "int8": Scheme(255, None, False),
    "int4": Scheme(15, 32, True),
    "float8_e4m3fn": Scheme(None, None, False),
}
_LARGEST = 448.0  # of float8_e4m3fn
_HALF = 65504.0  # the largest of float16
_SCALE_BYTES = 4
"""Of a group: a float16 scale and a float16 zero point."""


def groups_of(kv_dtype: str, dim: int) -> int:
    """Scales of a row of `dim` channels: as many as divide it into equal groups of no less than the scheme's."""
    group = SCHEMES[kv_dtype].group
    if group is None:
        return 1
    return next(count for count in range(max(1, dim // group), 0, -1) if dim % count == 0)


def row_bytes(kv_dtype: str, dim: int) -> int:
    """Bytes of a quantised row of `dim` numbers."""
    codes = dim // 2 if SCHEMES[kv_dtype].levels == 15 else dim
    return codes + scale_bytes(kv_dtype, dim)


def scale_bytes(kv_dtype: str, dim: int) -> int:
    """Bytes of a quantised row that hold no codes."""
    return groups_of(kv_dtype, dim) * _SCALE_BYTES


def to_rows(values: Tensor, kv_dtype: str | None, *, keys: bool) -> Tensor:
    """Rows of an arena.

    A row's numbers are shared out into groups of neighbours. In a group from `lo` to `hi`, `zero = float16(lo)` and
    `scale = float16((hi - lo) / levels)`; the code of `x` is the integer nearest to `(x - zero) / scale`, ties to even, and is
    read as `zero + scale * code`. Two 4-bit codes share a byte: those of the first half of the channels are the low halves.
    `"float8_e4m3fn"` has a scale that makes the largest number 448, and a zero point of 0. Keys of `"int4"` are rotated before
    ([`rotate`][]). One token's row depends on nothing but that token, as in KVQuant (arXiv 2401.18079) for values; why keys,
    too, and what else was measured stands in `docs/quantised-cache.md`. Numbers beyond float16's range saturate; a group with
    a NaN is NaN.

    Args:
        values: `[..., D]`, keys or values.
        kv_dtype: As in `EvictionConfig`; None: as they are.
        keys: Whether they are keys.

    Returns:
        uint8 `[..., R]`, `R` of [`row_bytes`][]; `values` itself for None.
    """
    if kv_dtype is None:
        return values
    scheme = SCHEMES[kv_dtype]
    wide = values.to(torch.float32)
    if scheme.rotates and keys:
        wide = rotate(wide)
    grouped = wide.reshape(*values.shape[:-1], groups_of(kv_dtype, values.shape[-1]), -1)
    if scheme.levels is None:
        scale = (grouped.abs().amax(-1, keepdim=True) / _LARGEST).to(torch.float16)
        zero = torch.zeros_like(scale)
        scaled = (grouped / _divisor(scale)).clamp(-_LARGEST, _LARGEST).flatten(-2)
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        low = grouped.amin(-1, keepdim=True).clamp(-_HALF, _HALF)
        high = grouped.amax(-1, keepdim=True).clamp(-_HALF, _HALF)
        zero = low.to(torch.float16)
        scale = ((high - low) / scheme.levels).to(torch.float16)
        whole = ((grouped - zero.to(torch.float32)) / _divisor(scale)).round().clamp(0, scheme.levels)
        codes = whole.flatten(-2).nan_to_num(0.0).to(torch.uint8)
        if scheme.levels == 15:
            first, second = codes.chunk(2, dim=-1)
            codes = first | (second << 4)
    return torch.cat([codes, _bytes_of(scale[..., 0]), _bytes_of(zero[..., 0])], dim=-1)


def from_rows(rows: Tensor, form: RowForm, *, keys: bool) -> Tensor:
    """What [`to_rows`][] wrote, as `[..., D]` in the model's dtype; keys are rotated back."""
    if form.kv_dtype is None:
        return rows
    scheme, groups = SCHEMES[form.kv_dtype], groups_of(form.kv_dtype, form.dim)
    codes, scale, zero = torch.split(rows, [rows.shape[-1] - 4 * groups, 2 * groups, 2 * groups], dim=-1)
    if scheme.levels is None:
        numbers = codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    else:
        if scheme.levels == 15:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        numbers = codes.to(torch.float32)
    grouped = numbers.reshape(*rows.shape[:-1], groups, -1)
    wide = (_of_bytes(zero).unsqueeze(-1) + _of_bytes(scale).unsqueeze(-1) * grouped).flatten(-2)
    return (rotate(wide) if scheme.rotates and keys else wide).to(form.model)


def rotate(values: Tensor) -> Tensor:
    """`[..., D]` float32 times an orthogonal Hadamard matrix, which spreads outlier channels (QuaRot, arXiv 2404.00456).

    It is symmetric, its own inverse, and changes no product of a rotated query and a rotated key. Where `D` is no power of
    two, blocks of the largest power of two that divides it are rotated each for itself.
    """
    block = values.shape[-1] & -values.shape[-1]
    index = torch.arange(block, device=values.device)
    parity = index[:, None] & index
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    matrix = (1 - 2 * (parity & 1)).to(torch.float32) * block**-0.5
    return exact_matmul(values.reshape(*values.shape[:-1], -1, block), matrix).flatten(-2)


def _divisor(scale: Tensor) -> Tensor:
    """A float16 scale as what to divide by: of equal numbers it is 0, and so are their codes."""
    wide = scale.to(torch.float32)
    return torch.where(wide == 0, 1.0, wide)


def _bytes_of(halves: Tensor) -> Tensor:
    """float16 `[..., G]` to uint8 `[..., 2 G]`: all low bytes, then all high ones."""
    bits = halves.view(torch.int16).to(torch.int32)
    return torch.cat([bits & 255, (bits >> 8) & 255], dim=-1).to(torch.uint8)


def _of_bytes(parts: Tensor) -> Tensor:
    """What `_bytes_of` took, as float32."""
    low, high = parts.to(torch.int32).chunk(2, dim=-1)
    return (low | (high << 8)).to(torch.int16).view(torch.float16).to(torch.float32)
