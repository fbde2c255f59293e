"""The C++ kernel of weighted sums of attention rows against the plain function and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from tests.kernels.comparing import check_scores, exact_scores, threads, unfused_weigh
from tests.ops.prompts import Layer, make_layer, vision_at
from tgvkv_compile.ops import weighing
from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.kernels.cpu import weigh as cpu_weigh

DTYPES = [torch.float32, torch.bfloat16]
MASKS = ["none", "bool", "prefix", "both"]


def by_kernel(weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    kernel = cpu_weigh.kernel_for(weights, rows)
    assert kernel is not None
    return cpu_weigh.weigh_by(kernel, weights, wanted, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads"), [(4, 2, 1), (64, 4, 4), (80, 7, 1), (96, 2, 1), (128, 8, 2), (256, 3, 1)]
)
def test_every_dtype_head_dim_and_group(dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> None:
    layer = make_layer(heads=heads, kv_heads=kv_heads, length=200, dim=dim, dtype=dtype)
    layer.scale = dim**-0.5
    check_scores(by_kernel, layer)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    length = draw(st.integers(4, 150))
    batch = draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([1, 2]))
    start = draw(st.integers(0, length - 2))
    padding = tuple(draw(st.integers(0, length - 2)) for _ in range(batch))
    return make_layer(
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        length=length,
        dim=draw(st.sampled_from([3, 16, 40])),
        vision=vision_at(length, (start, draw(st.integers(1, length - start)))).expand(batch, -1),
        padding=draw(st.sampled_from([(), padding])),
        mask=draw(st.sampled_from(MASKS)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9999)),
    )


@given(layers(), st.integers(1, 3))
@settings(max_examples=150)
def test_random_layers(layer: Layer, count: int) -> None:
    with threads(count):
        check_scores(by_kernel, layer)


@given(layers(), st.data())
@settings(max_examples=60)
def test_any_weights_and_columns(layer: Layer, data: st.DataObject) -> None:
    lse = exact_scores(layer)[0].float()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    valid = layer.token_types.valid
    weights = torch.rand(valid.shape, generator=generator) * (torch.rand(valid.shape, generator=generator) < 0.3) * valid
    wanted = data.draw(st.sampled_from([None, valid & (torch.rand(valid.shape, generator=generator) < 0.2)]))
    rows = layer.rows(lse)
    found, plain = (weigh(weights.unsqueeze(1), wanted, rows) for weigh in (by_kernel, unfused_weigh))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_rows_of_a_later_turn() -> None:
    """Fewer rows than columns, keys in a layout of their own, one mask for all samples."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 4, 16, generator=generator).transpose(1, 2)  # as a projection lays it out
    k = torch.randn(2, 2, 23, 16, generator=generator)[:, :, 3:]
    seen = torch.rand(1, 1, 5, 20, generator=generator) < 0.7
    seen[..., 0] = True
    valid = torch.ones(2, 20, dtype=torch.bool)
    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.25).masked_fill(~seen, float("-inf"))
    rows = AttentionRows(q, k, valid, seen, False, 0.25, logits.logsumexp(-1))
    weights = torch.rand(2, 1, 5, generator=generator)
    for one, other in zip(by_kernel(weights, None, rows), unfused_weigh(weights, None, rows), strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    by = cpu_weigh.weigh_by
    monkeypatch.setattr(cpu_weigh, "weigh_by", lambda *args: called.append(1) or by(*args))
    layer = make_layer(batch=2, heads=4, kv_heads=2, length=30, dim=8, mask="bool")
    lse = exact_scores(layer)[0].float()
    library.opcheck(torch.ops.tgvkv.weigh.default, (layer.weights()[:, :1], layer.token_types.vision, *layer.rows(lse)))
    assert called


@pytest.mark.parametrize("mask", ["additive", "per-head"])
def test_other_masks_go_the_plain_way(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_weigh, "weigh_by", lambda *_: pytest.fail("called"))
    layer = make_layer(batch=2, heads=4, kv_heads=2, length=30, mask=mask)
    rows = layer.rows(exact_scores(layer)[0].float())
    found = weighing.weigh(layer.weights(), layer.token_types.vision, rows)
    plain = unfused_weigh(layer.weights(), layer.token_types.vision, rows)
    assert torch.equal(found.sums, plain[0]) and torch.equal(found.seen, plain[1])
