"""The ops with their CUDA implementations, registered for the CPU while a test runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import library

from tests.kernels.cases import quantised, random_step
from tests.ops.prompts import make_layer
from tgvkv_compile.ops import weighing
from tgvkv_compile.ops.cache import decode_step
from tgvkv_compile.ops.kernels.triton import decode
from tgvkv_compile.ops.kernels.triton import weigh as prefill


@pytest.fixture
def on_cpu() -> Iterator[None]:
    weigh = weighing._weigh
    before = weigh._backend_fns.get("cpu")
    weigh.register_kernel("cpu", weighing.weigh_on_cuda)
    with library._scoped_library("tgvkv", "IMPL") as scoped:
        scoped.impl("decode_step", decode_step._decode_step_on_cuda, "CPU")
        yield
    weigh.register_kernel("cpu", before or weighing.weigh_on_cpu)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("group", "kv_dtype"), [(1, None), (4, None), (4, "int8"), (1, "int4")])
def test_decode_step(group: int, kv_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    step = decode.fused_decode_step
    monkeypatch.setattr(decode, "fused_decode_step", lambda *args: called.append(1) or step(*args))
    case = random_step(batch=2, kv_heads=2, group=group, dim=64, longest=30)
    case = case if kv_dtype is None else quantised(case, kv_dtype)
    args = (case.query, case.key, case.value, *case.state, case.layer, case.scale, "ratio", 4, kv_dtype)
    library.opcheck(torch.ops.tgvkv.decode_step.default, args)
    assert called


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_weigh(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    fused = prefill.fused_weigh
    monkeypatch.setattr(prefill, "fused_weigh", lambda *args: called.append(1) or fused(*args))
    layer = make_layer(batch=2, heads=4, kv_heads=2, length=30, dim=64, mask=mask)
    lse = torch.rand(2, 4, 30) + 3.0
    library.opcheck(torch.ops.tgvkv.weigh.default, (layer.weights(), layer.token_types.vision, *layer.rows(lse)))
    assert called


@pytest.mark.usefixtures("on_cpu")
def test_what_the_kernels_are_not_made_for_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "fused_decode_step", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(prefill, "fused_weigh", lambda *_: pytest.fail("launched"))
    case = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=20, dtype=torch.float64)
    args = (case.query, case.key, case.value, *case.fresh(), case.layer, case.scale, "ratio", 4)
    torch.testing.assert_close(torch.ops.tgvkv.decode_step(*args), case.exact()[0], rtol=1e-5, atol=1e-6)
    layer = make_layer(length=30)
    torch.testing.assert_close(layer.scores(), layer.materialised_scores())
    per_head = make_layer(length=30, heads=4, kv_heads=2, mask="per-head")
    lse = torch.rand(1, 4, 30) + 3.0
    per_head.scores(lse)
