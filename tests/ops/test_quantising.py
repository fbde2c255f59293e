import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.quantising import LEVELS, slowly
from tgvkv_compile.config import KVDtype
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.ops.cache.quantising import (
    Quantised,
    bytes_per_entry,
    dequantise,
    quantise,
    rotated,
)

KINDS = get_args(KVDtype)
DIMS = (2, 4, 32, 40, 64, 72, 80, 96, 128, 256)


def vectors(seed: int, dim: int, spread: float, offset: float, outliers: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[2, 3, 5, D]`, some channels far off in all of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, 5, dim, generator=generator) * spread + offset
    values[..., torch.randperm(dim, generator=generator)[:outliers]] += 20 * spread
    return values.to(dtype)


@st.composite
def any_vectors(draw: st.DrawFn) -> Tensor:
    return vectors(
        draw(st.integers(0, 10_000)),
        draw(st.sampled_from(DIMS)),
        draw(st.sampled_from([0.0, 1e-7, 1e-4, 1.0, 30.0, 3000.0])),
        draw(st.sampled_from([0.0, 1e-6, -1.0, 12.34, -5000.0])),
        draw(st.integers(0, 2)),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    ).clamp(-60_000, 60_000)


def codes_of(quantised: Quantised, kind: str) -> list[list[float]]:
    """A list per vector, channel by channel; of packed codes read byte by byte."""
    rows = quantised.codes.reshape(-1, quantised.codes.shape[-1]).tolist()
    if kind != "int4":
        return rows
    return [[float(byte % 16) for byte in row] + [float(byte // 16) for byte in row] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@given(any_vectors())
@settings(max_examples=25)
def test_bit_for_bit_what_the_slow_way_gives(kind: KVDtype, values: Tensor) -> None:
    found = quantise(values, kind)
    dim = values.shape[-1]
    back = dequantise(found, kind).reshape(-1, dim)
    scales = found.scales.float().reshape(-1, 2).tolist()
    for row, vector in enumerate(values.float().reshape(-1, dim).numpy()):
        codes, scale, zero = slowly(vector, kind)
        assert codes_of(found, kind)[row] == codes
        assert scales[row] == [scale, zero]
        expected = [float(np.float32(np.float32(code) * np.float32(scale)) + np.float32(zero)) for code in codes]
        assert back[row].tolist() == expected


# Errors


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(any_vectors())
def test_no_value_is_off_by_more_than_half_a_step(kind: KVDtype, values: Tensor) -> None:
    found = quantise(values, kind)
    off = (dequantise(found, kind) - values.float()).abs().amax(-1)
    scale, zero = found.scales.unbind(-1)
    clipped = LEVELS[kind] * ulp(scale) / 2 + ulp(zero) / 2
    noise = 4 * torch.finfo(torch.float32).eps * values.float().abs().amax(-1)
    assert bool((off <= scale.float() / 2 + clipped + noise).all())


@given(any_vectors())
def test_no_value_in_float8_is_off_by_more_than_its_rounding(values: Tensor) -> None:
    found = quantise(values, "float8_e4m3fn")
    scale = found.scales[..., :1].float()
    off = (dequantise(found, "float8_e4m3fn") - values.float()).abs()
    clipped = 448 * ulp(found.scales[..., :1]) / 2
    half_steps = torch.maximum(values.float().abs() / 16, scale * 2.0**-10)
    assert bool((off <= half_steps * (1 + 1e-5) + clipped).all())


def ulp(values: Tensor) -> Tensor:
    """Distance of float16 values to the next one, float32."""
    size = values.abs()
    return (torch.nextafter(size, torch.full_like(size, torch.inf)).float() - size.float()).clamp(max=32.0)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_come_back_as_zeros(kind: KVDtype) -> None:
    found = quantise(torch.zeros(2, 64), kind)
    assert torch.equal(dequantise(found, kind), torch.zeros(2, 64))
    assert not found.scales.isnan().any()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [1.0, -0.25, 1.7e-4, 655.0, -65504.0])
def test_a_vector_of_one_value_comes_back_as_it(kind: KVDtype, value: float) -> None:
    values = torch.full((1, 64), value).half()
    assert torch.equal(dequantise(quantise(values, kind), kind, torch.float16), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(kind: KVDtype, broken: float) -> None:
    values = torch.randn(2, 64)
    values[1, 40] = broken
    found = dequantise(quantise(values, kind), kind)
    assert bool(found[0].isfinite().all())
    assert bool(found[1].isnan().all())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_float16_cannot_hold_is_nan_not_another_value(kind: KVDtype) -> None:
    assert bool(dequantise(quantise(torch.full((1, 8), -1e5), kind), kind).isnan().all())


def test_more_bits_lose_less() -> None:
    values = vectors(0, 64, 1.0, 0.0, outliers=2)
    lost = {kind: float((dequantise(quantise(values, kind), kind) - values).square().mean()) for kind in KINDS}
    assert lost["int8"] < lost["float8_e4m3fn"] < lost["int4"]


# Layout


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_dtypes_and_bytes(kind: KVDtype, dim: int) -> None:
    found = quantise(vectors(0, dim, 1.0, 0.0, dtype=torch.bfloat16), kind)
    assert found.codes.shape == (2, 3, 5, dim // 2 if kind == "int4" else dim)
    assert found.codes.dtype == (torch.float8_e4m3fn if kind == "float8_e4m3fn" else torch.uint8)
    assert found.scales.shape == (2, 3, 5, 2) and found.scales.dtype == torch.float16
    held = sum(part.numel() * part.element_size() for part in found)
    assert held == 2 * 3 * 5 * bytes_per_entry(kind, dim, torch.bfloat16)
    back = dequantise(found, kind, torch.bfloat16)
    assert back.shape == (2, 3, 5, dim) and back.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "most"), [(None, 1.0), ("int8", 0.55), ("float8_e4m3fn", 0.55), ("int4", 0.32)], ids=lambda value: str(value)
)
def test_bytes_at_head_dim_64(kind: KVDtype | None, most: float) -> None:
    whole = bytes_per_entry(None, 64, torch.bfloat16)
    assert whole == 128
    assert bytes_per_entry(kind, 64, torch.bfloat16) <= most * whole
    assert bytes_per_entry(None, 64, torch.float32) == 2 * whole


def test_every_pair_of_codes_is_unpacked_as_it_was_packed() -> None:
    """All 256 bytes: values that are codes already, with 0 and 15 among them."""
    low, high = torch.arange(256) % 16, torch.arange(256) // 16
    ends = torch.tensor([[0, 15]]).expand(256, -1)
    values = torch.cat([low[:, None], ends, high[:, None], ends], dim=1).float()
    found = quantise(values, "int4")
    assert found.codes[:, 0].tolist() == list(range(256))
    assert torch.equal(dequantise(found, "int4"), values)


@pytest.mark.parametrize(
    "function", [lambda: bytes_per_entry("int4", 7, torch.float32), lambda: quantise(torch.ones(1, 7), "int4")]
)
def test_odd_head_dims_are_refused_in_four_bits(function: Any) -> None:
    with pytest.raises(ConfigError, match="packs two channels into a byte, and head dim 7 is odd; use 'int8'"):
        function()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_needs_no_other(kind: KVDtype) -> None:
    values = vectors(3, 64, 1.0, 0.5, outliers=1)
    whole = quantise(values, kind)
    alone = quantise(values[:, :, 2:3], kind)
    assert torch.equal(whole.codes[:, :, 2:3].float(), alone.codes.float())
    assert torch.equal(whole.scales[:, :, 2:3], alone.scales)


# Rotation


@pytest.mark.parametrize("dim", [1, *DIMS])
def test_rotation_is_orthogonal_and_its_own_inverse(dim: int) -> None:
    matrix = rotated(torch.eye(dim))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotated(matrix), torch.eye(dim), atol=1e-6, rtol=0)
    block = dim & -dim
    assert int((matrix != 0).sum()) == dim * block


@given(any_vectors(), st.integers(0, 100))
def test_rotation_leaves_products_as_they_are(keys: Tensor, seed: int) -> None:
    keys = keys.float()
    queries = torch.randn(keys.shape, generator=torch.Generator().manual_seed(seed))
    expected = queries.double() @ keys.double().mT
    found = rotated(queries).double() @ rotated(keys).double().mT
    size = queries.norm(dim=-1)[..., :, None] * keys.norm(dim=-1)[..., None, :]
    assert bool(((found - expected).abs() <= 2e-6 * size + 1e-30).all())


def test_rotation_spreads_an_outlier() -> None:
    values = torch.zeros(1, 64)
    values[0, 17] = 8.0
    torch.testing.assert_close(rotated(values).abs(), torch.ones(1, 64))
