import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.comparing import check_scores, exact_scores, scores, unfused_weigh
from tests.ops.prompts import Layer, make_layer, vision_at
from tgvkv_compile.ops.kernels.triton import weigh as kernels
from tgvkv_compile.ops.kernels.triton.weigh import fused_applies, fused_weigh

MASKS = ["none", "bool", "additive", "prefix", "both"]


def check(layer: Layer) -> None:
    assert fused_applies(layer.rows(torch.zeros(layer.q.shape[:3])))
    check_scores(fused_weigh, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 4, 4), (80, 7, 1), (96, 2, 1), (128, 8, 2), (256, 3, 1)])
def test_every_dtype_head_dim_and_group(dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> None:
    layer = make_layer(heads=heads, kv_heads=kv_heads, length=100, dim=dim, dtype=dtype)
    layer.scale = dim**-0.5
    check(layer)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 150))
    spans = st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), max_size=3)
    layer = make_layer(
        batch=batch,
        heads=draw(st.sampled_from([2, 4])),
        kv_heads=draw(st.sampled_from([1, 2])),
        length=length,
        dim=64,
        vision=torch.stack([vision_at(length, *draw(spans)) for _ in range(batch)]),
        padding=tuple(draw(st.integers(0, length - 1)) for _ in range(batch)),
        mask=draw(st.sampled_from(MASKS)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 99)),
    )
    layer.scale = 0.125
    return layer


@given(layers(), st.sampled_from([1, 132]))
@settings(max_examples=25)
def test_random_prompts(layer: Layer, processors: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "processors", lambda device: processors)
        check(layer)


def test_a_turn_has_fewer_rows_than_columns() -> None:
    layer = make_layer(heads=4, kv_heads=2, length=90, dim=64, mask="bool")
    whole = layer.rows(exact_scores(layer)[0].float())
    rows = slice(60, None)
    part = whole._replace(q=whole.q[:, :, rows], attn_mask=layer.attn_mask[:, :, rows], lse=whole.lse[:, :, rows])
    plain, fused = (scores(weigh, part, layer.token_types) for weigh in (unfused_weigh, fused_weigh))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_blocks_without_a_wanted_column_are_zero_and_rows_may_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    layer = make_layer(heads=2, kv_heads=1, length=600, dim=64)
    rows = layer.rows(exact_scores(layer)[0].float())
    assert kernels.weigh_launch(1, 2, 600, 64, torch.float32, 132).parts > 1
    wanted = torch.zeros(1, 600, dtype=torch.bool)
    wanted[:, 400:403] = True
    weights = torch.ones(1, 2, 600) * torch.tensor([1.0, 0.5])[:, None]
    sums, seen = fused_weigh(weights, wanted, rows)
    attention, visible = rows.attention(0, 600)
    for index, weight in enumerate((1.0, 0.5)):
        torch.testing.assert_close(sums[:, index], torch.where(wanted, weight * attention.sum(1), 0.0))
        torch.testing.assert_close(seen[:, index], torch.where(wanted, weight * visible.float().sum(1), 0.0))
