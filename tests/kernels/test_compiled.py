"""Every variant of the kernels compiles for compute capability 8.0 and 9.0, and keeps what it works on in registers."""

import os
from typing import get_args

import pytest
import torch

pytest.importorskip("triton")

import triton

from tests.kernels.cases import quantised, random_step
from tests.kernels.compiling import PROCESSORS, compiling_only
from tests.ops.prompts import make_layer
from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.kernels.triton import decode
from tgvkv_compile.ops.kernels.triton import weigh as prefill

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels compile nothing")

MOST_SPILLED = 0 if triton.__version__ >= "3.7" else 8
"""Bytes. With Triton 3.6 one float32 variant of `weigh_attention` (head dim 256, capability 8.0) spills 8."""
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a block may have."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = [(64, 1), (64, 7), (80, 1), (96, 4), (128, 1), (128, 4), (128, 8), (256, 1), (256, 2), (256, 8)]
"""Head dims, and query heads per key head."""
SOME_HEADS = [(64, 7), (80, 1), (128, 4), (256, 1), (256, 8)]
ROWS = [
    *((torch.bfloat16, *heads) for heads in [(64, 1), (128, 4)]),
    *(
        pytest.param(dtype, *heads, marks=pytest.mark.slow)
        for dtype, some in ((torch.float32, [(64, 7), (80, 7), (256, 8)]), (torch.float16, [(128, 1), (256, 1)]))
        for heads in some
    ),
]
STEPS = [*((torch.bfloat16, *heads) for heads in HEADS), *((dtype, *heads) for dtype in DTYPES[:2] for heads in SOME_HEADS)]


@pytest.mark.parametrize("capability", PROCESSORS)
@pytest.mark.parametrize(("dtype", "dim", "group"), STEPS, ids=str)
def test_decode(dim: int, group: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "processors", lambda _: PROCESSORS[capability])
    case = random_step(batch=1, kv_heads=2, group=group, dim=dim, layers=2, longest=600, dtype=dtype)
    with compiling_only(capability, monkeypatch) as compiled:
        for mode in ("ratio", "fixed", "keep"):
            decode.fused_decode_step(case.query, case.key, case.value, case.state, case.layer, case.scale, mode, 4)
    assert [usage.name for usage in compiled] == ["attend_split", "finish_step"] * 3
    for usage in compiled:
        assert usage.spilled <= MOST_SPILLED, f"{usage} spills"
        assert usage.shared <= SHARED[capability]


@pytest.mark.parametrize("capability", PROCESSORS)
@pytest.mark.parametrize("kv_dtype", get_args(KVDtype))
@pytest.mark.parametrize(("dtype", "dim", "group"), ROWS, ids=str)
def test_decode_of_codes(
    dim: int, group: int, dtype: torch.dtype, kv_dtype: KVDtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "processors", lambda _: PROCESSORS[capability])
    whole = random_step(batch=1, kv_heads=2, group=group, dim=dim, layers=2, longest=600, dtype=dtype)
    case = quantised(whole, kv_dtype)
    with compiling_only(capability, monkeypatch) as compiled:
        options = (case.layer, case.scale, "ratio", 4, kv_dtype)
        decode.fused_decode_step(case.query, case.key, case.value, case.state, *options)
    assert [usage.name for usage in compiled] == ["attend_rows", "finish_step"]
    for usage in compiled:
        assert usage.spilled <= MOST_SPILLED, f"{usage} spills"
        assert usage.shared <= SHARED[capability]


@pytest.mark.parametrize("capability", PROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [80, 128, 256])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_prefill(mask: str, dim: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "processors", lambda _: PROCESSORS[capability])
    layer = make_layer(heads=4, kv_heads=2, length=600, dim=dim, dtype=dtype, mask=mask)
    with compiling_only(capability, monkeypatch) as compiled:
        prefill.fused_weigh(layer.weights(), layer.token_types.vision, layer.rows(torch.rand(1, 4, 600)))
    assert len(compiled) == 2
    for usage in compiled:
        assert usage.spilled <= MOST_SPILLED, f"{usage} spills"
        assert usage.shared <= SHARED[capability]
