"""How an arena holds a key or value of one token and head: a row, of the model's own numbers or of codes and their scales.

A quantised row is bytes: the codes, and behind them what they are read with. So an arena is one tensor whatever it holds, and
all that moves whole rows (beams, copies, growth, `crop`) knows nothing of it. What writes to and reads from one goes through
[`to_rows`][] and [`from_rows`][].
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.quantising import (
    PARAMETERS,
    Quantised,
    bytes_per_entry,
    dequantise,
    quantise,
    rotated,
)


@dataclasses.dataclass(frozen=True)
class RowForm:
    """What rows look like.

    Attributes:
        kv_dtype: As in `EvictionConfig`; None: the model's own numbers.
        dim: D.
        model: dtype of the model's keys, or values.
    """

    kv_dtype: KVDtype | None
    dim: int
    model: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, kv_dtype: KVDtype | None) -> "RowForm":
        """The form in which a tensor `[..., D]` is held."""
        return cls(kv_dtype, tensor.shape[-1], tensor.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of an arena."""
        return self.model if self.kv_dtype is None else torch.uint8

    @property
    def size(self) -> int:
        """Elements of a row: an arena's last dimension."""
        return self.bytes // self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return bytes_per_entry(self.kv_dtype, self.dim, self.model)

    @property
    def scale_bytes(self) -> int:
        """Those of them that hold no codes."""
        return 0 if self.kv_dtype is None else 2 * PARAMETERS.itemsize

    @property
    def code_bytes(self) -> int:
        """Those of them that do."""
        return self.bytes - self.scale_bytes


class KVForms(NamedTuple):
    """The forms of keys and of values."""

    key: RowForm
    value: RowForm

    @classmethod
    def of(cls, key: Tensor, value: Tensor, kv_dtype: KVDtype | None = None) -> "KVForms":
        """The forms in which keys and values `[..., D]` are held."""
        return cls(RowForm.of(key, kv_dtype), RowForm.of(value, kv_dtype))

    @property
    def bytes(self) -> int:
        """Bytes of one token's key and value of one head."""
        return self.key.bytes + self.value.bytes

    @property
    def unquantised_bytes(self) -> int:
        """What it would be in the model's own dtype."""
        return sum(form.dim * form.model.itemsize for form in self)


def to_rows(values: Tensor, kv_dtype: KVDtype | None, *, keys: bool) -> Tensor:
    """Rows of an arena.

    A row is the codes of one token and head ([`quantise`][tgvkv_compile.ops.cache.quantising.quantise]), and behind them the
    low and then the high bytes of its scale and zero point. Keys are rotated before.

    Args:
        values: `[..., D]`, keys or values.
        kv_dtype: As in `EvictionConfig`; None: as they are.
        keys: Whether they are keys.

    Returns:
        uint8 `[..., R]`, `R` of [`bytes_per_entry`][tgvkv_compile.ops.cache.quantising.bytes_per_entry]; `values` for None.

    Raises:
        ConfigError: The head dim cannot be packed.
    """
    if kv_dtype is None:
        return values
    rows: Tensor = torch.ops.tgvkv.to_rows(values, kv_dtype, keys)
    return rows


# Opaque to Inductor: it leaves roundings to float16 out, and its vectors of uint8 were wrong (torch 2.13, batches).
@library.custom_op("tgvkv::to_rows", mutates_args=(), schema="(Tensor values, str kv_dtype, bool keys) -> Tensor")
def _to_rows(values: Tensor, kv_dtype: Any, keys: bool) -> Tensor:
    held = quantise(rotated(values) if keys else values, kv_dtype)
    bits = held.scales.view(torch.int16).to(torch.int32)
    parts = [held.codes.view(torch.uint8), (bits & 255).to(torch.uint8), ((bits >> 8) & 255).to(torch.uint8)]
    return torch.cat(parts, dim=-1)


@_to_rows.register_fake
def _(values: Tensor, kv_dtype: Any, keys: bool) -> Tensor:
    return values.new_empty((*values.shape[:-1], RowForm.of(values, kv_dtype).size), dtype=torch.uint8)


def from_rows(rows: Tensor, form: RowForm, *, keys: bool) -> Tensor:
    """What [`to_rows`][] wrote, as `[..., D]` in the model's dtype; keys are rotated back."""
    if form.kv_dtype is None:
        return rows
    codes, low, high = torch.split(rows, [rows.shape[-1] - 4, 2, 2], dim=-1)
    if form.kv_dtype == "float8_e4m3fn":
        codes = codes.contiguous().view(torch.float8_e4m3fn)
    bits = (low.to(torch.int32) | (high.to(torch.int32) << 8)).to(torch.int16)
    values = dequantise(Quantised(codes, bits.view(torch.float16)), form.kv_dtype)
    return (rotated(values) if keys else values).to(form.model)
