"""Ways to quantise keys and values that were measured against each other; what the package does is among them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.quantising import bytes_per_entry, dequantise, quantise

Coder = Callable[[Tensor, int], Tensor]
"""Vectors `[B, Hkv, S, D]` and how many of the tokens are the prompt's, to what is read again."""


def _same(values: Tensor, prompt: int) -> Tensor:
    return values


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way.

    Attributes:
        name: In the table.
        key: Of keys.
        value: Of values.
        extra: Bytes of a key's and a value's scales together, at head dim 64.
        bits: Of a code.
        centred: Take the prompt's mean off all keys first.
        turned: `"k"`: rotate keys (and queries), `"kv"`: values too.
        sinks: First tokens that are coded otherwise.
        newest: Newest tokens that are.
        better: What they are coded by; kept whole by default.
    """

    name: str
    key: Coder
    value: Coder
    extra: float
    bits: int
    centred: bool = False
    turned: str = ""
    sinks: int = 0
    newest: int = 0
    better: Coder = _same

    @property
    def share(self) -> float:
        """Bytes of a key and a value over those in bfloat16, at head dim 64."""
        return (2 * 64 * self.bits / 8 + self.extra) / 256


def packages(kind: KVDtype) -> Coder:
    """What the package does."""
    return lambda values, prompt: dequantise(quantise(values, kind), kind)


def symmetric(bits: int, group: int = 0) -> Coder:
    """A float16 scale per token and group of channels (0: all of them), no zero point; the largest value is the least code."""
    least = -(2.0 ** (bits - 1))

    def coder(values: Tensor, prompt: int) -> Tensor:
        groups = _grouped(values, group)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = _stored(largest / least)
        codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(least, -least - 1)
        return (codes * scale).flatten(-2)

    return coder


def asymmetric(bits: int, group: int = 0) -> Coder:
    """A float16 scale and a float16 zero point per token and group of channels (0: all of them)."""
    return lambda values, prompt: _coded(_grouped(values, group), -1, bits).flatten(-2)


def refitted(bits: int, group: int) -> Coder:
    """The same, and of four narrower ranges the one that loses least, each refitted to its codes by least squares."""
    most = 2.0**bits - 1

    def coder(values: Tensor, prompt: int) -> Tensor:
        groups = _grouped(values, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        best, least = groups, torch.full_like(low, torch.inf)
        for narrower in (0.0, 0.04, 0.08, 0.12):
            scale, zero = (high - low) * (1 - narrower) / most, low + (high - low) * narrower / 2
            codes = ((groups - zero) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, most)
            off = codes - codes.mean(-1, keepdim=True)
            fitted = _stored((off * groups).sum(-1, keepdim=True) / off.square().sum(-1, keepdim=True).clamp(min=1e-9))
            found = codes * fitted + _stored(groups.mean(-1, keepdim=True) - fitted * codes.mean(-1, keepdim=True))
            lost = (found - groups).square().sum(-1, keepdim=True)
            best, least = torch.where(lost < least, found, best), torch.minimum(lost, least)
        return best.flatten(-2)

    return coder


def per_channel(bits: int) -> Coder:
    """Scales and zero points per channel, fixed by the prompt (KVQuant, arXiv 2401.18079, uniform codes)."""
    most = 2.0**bits - 1

    def coder(values: Tensor, prompt: int) -> Tensor:
        low = values[:, :, :prompt].amin(2, keepdim=True)
        scale = (values[:, :, :prompt].amax(2, keepdim=True) - low).clamp(min=1e-9) / most
        return ((values - low) / scale).round().clamp(0, most) * scale + low

    return coder


def per_channel_blocks(bits: int, tokens: int = 32) -> Coder:
    """Scales and zero points per channel and block of tokens (KIVI, arXiv 2402.02750)."""

    def coder(values: Tensor, prompt: int) -> Tensor:
        length = values.shape[2]
        whole = torch.cat([values, values[:, :, -1:].expand(-1, -1, -length % tokens, -1)], dim=2)
        return _coded(whole.unflatten(2, (-1, tokens)), 3, bits).flatten(2, 3)[:, :, :length]

    return coder


def _coded(values: Tensor, dim: int, bits: int) -> Tensor:
    most = 2.0**bits - 1
    zero = _stored(values.amin(dim, keepdim=True))
    scale = _stored((values.amax(dim, keepdim=True) - zero).clamp(min=0) / most)
    return ((values - zero) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, most) * scale + zero


def _grouped(values: Tensor, group: int) -> Tensor:
    return values.unflatten(-1, (-1, group or values.shape[-1]))


def _stored(values: Tensor) -> Tensor:
    return values.to(torch.float16).to(torch.float32)


def _bfloat16(values: Tensor, prompt: int) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def _both(name: str, coder: Coder, extra: float, bits: int, **how: object) -> Scheme:
    return Scheme(name, coder, coder, extra, bits, **how)  # type: ignore[arg-type]


def _packages(kind: KVDtype, words: str = "", **how: object) -> Scheme:
    bits = 4 if kind == "int4" else 8
    extra = 2 * (bytes_per_entry(kind, 64, torch.bfloat16) - 8 * bits)
    return _both(f"{kind}{words}", packages(kind), extra, bits, **how)


def _groups_of_32(words: str, **how: object) -> Scheme:
    return _both(f"int4, groups of 32{words}", asymmetric(4, 32), 16, 4, **how)


NEWEST = 16
"""Tokens at the end of a cache in four bits that are held in eight as well, and read from there."""
_NEWEST = {"newest": NEWEST, "better": packages("int8")}

SCHEMES = (
    _both("bfloat16", _bfloat16, 0, 16),
    _packages("int8"),
    _packages("int8", ", rotated", turned="k"),
    _packages("int8", ", centred", centred=True),
    _packages("int8", ", centred, rotated", centred=True, turned="k"),
    _both("int8, no zero point", symmetric(8), 4, 8),
    _both("int8, no zero point, rotated", symmetric(8), 4, 8, turned="k"),
    Scheme("int8, keys per channel", per_channel(8), packages("int8"), 4, 8),
    _packages("float8_e4m3fn"),
    _packages("float8_e4m3fn", ", rotated", turned="k"),
    _packages("int4"),
    _packages("int4", ", rotated", turned="k"),
    _packages("int4", ", rotated, newest 16 in int8", turned="k", **_NEWEST),
    _packages("int4", ", rotated, newest 16 whole", turned="k", newest=16),
    _packages("int4", ", newest 16 in int8", **_NEWEST),
    _packages("int4", ", centred, rotated", centred=True, turned="k"),
    _packages("int4", ", centred, rotated, newest 16 in int8", centred=True, turned="k", **_NEWEST),
    _packages("int4", ", keys and values rotated, newest 16 in int8", turned="kv", **_NEWEST),
    _both("int4, no zero point", symmetric(4), 4, 4),
    _both("int4, no zero point, rotated, newest 16 in int8", symmetric(4), 4, 4, turned="k", **_NEWEST),
    _groups_of_32(""),
    Scheme("int4, groups of 32, keys alone", asymmetric(4, 32), _same, 16, 4),
    Scheme("int4, groups of 32, values alone", _same, asymmetric(4, 32), 16, 4),
    _groups_of_32(", rotated", turned="k"),
    _groups_of_32(", centred", centred=True),
    _groups_of_32(", centred, rotated", centred=True, turned="k"),
    _groups_of_32(", newest 1 whole", newest=1),
    _groups_of_32(", newest 4 whole", newest=4),
    _groups_of_32(", newest 16 whole", newest=16),
    _groups_of_32(", newest 16 in int8", **_NEWEST),
    _groups_of_32(", first 4 whole", sinks=4),
    _groups_of_32(", first 4 and newest 16 whole", sinks=4, newest=16),
    _groups_of_32(", rotated, newest 16 in int8", turned="k", **_NEWEST),
    _both("int4, refitted groups of 32, centred, rotated", refitted(4, 32), 16, 4, centred=True, turned="k"),
    _both("int4, groups of 16", asymmetric(4, 16), 32, 4),
    _both("int4, groups of 16, centred, rotated", asymmetric(4, 16), 32, 4, centred=True, turned="k"),
    Scheme("int4, keys per channel", per_channel(4), packages("int4"), 4, 4),
    Scheme("int4, keys per channel in blocks of 32 tokens", per_channel_blocks(4), packages("int4"), 12, 4),
)
