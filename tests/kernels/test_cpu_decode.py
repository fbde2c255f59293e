"""The C++ kernel of a decode step against the plain functions."""

import dataclasses
import logging
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from tests.kernels.cases import StepCase, quantised, random_step
from tests.kernels.comparing import check_many_steps, check_step, decided, plain, same_books, threads
from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.kernels.cpu import compiled
from tgvkv_compile.ops.kernels.cpu import decode as cpu_decode
from tgvkv_compile.ops.state import CompactState

DTYPES = [torch.float32, torch.bfloat16]
MODES = ["ratio", "fixed", "keep"]


def by_kernel(query: Tensor, key: Tensor, value: Tensor, state: CompactState, *options: Any) -> Tensor:
    kernel = cpu_decode.kernel_for(query, key, value, state, *options[4:])
    assert kernel is not None
    return cpu_decode.decode_step_by(kernel, query, key, value, state, *options[:4])


def by_op(query: Tensor, key: Tensor, value: Tensor, state: CompactState, *options: Any) -> Tensor:
    output: Tensor = torch.ops.tgvkv.decode_step(query, key, value, *state, *options)
    return output


def stepped(case: StepCase, decode: str) -> tuple[Tensor, CompactState]:
    state = case.fresh()
    return by_kernel(case.query, case.key, case.value, state, case.layer, case.scale, decode, 4), state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (20, 3), (64, 1), (64, 4), (80, 7), (96, 2), (128, 8), (256, 1)])
@pytest.mark.parametrize("longest", [90, 700])
def test_every_dtype_head_dim_and_kind_of_group(dtype: torch.dtype, dim: int, group: int, longest: int) -> None:
    case = random_step(batch=2, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=longest, seed=dim + group)
    assert decided(case)
    check_step(by_kernel, case, "ratio")


@pytest.mark.parametrize("kv_dtype", get_args(KVDtype))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (20, 3), (64, 1), (64, 4), (80, 7), (96, 2), (128, 8), (256, 1)])
def test_codes_of_every_kind(kv_dtype: Any, dtype: torch.dtype, dim: int, group: int) -> None:
    for longest in (12, 90):
        whole = random_step(batch=2, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=longest, seed=dim + group)
        case = quantised(whole, kv_dtype, entries=3 if longest == 12 else 16)
        assert decided(case)
        check_step(by_kernel, case, "ratio")


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepCase, str, int, int]:
    case = random_step(
        batch=draw(st.integers(1, 4)),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.integers(1, 8)),
        dim=draw(st.sampled_from([4, 31, 64, 80])),
        layers=draw(st.integers(1, 4)),
        longest=draw(st.sampled_from([6, 17, 64, 300])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9999)),
    )
    return case, draw(st.sampled_from(MODES)), draw(st.sampled_from([0, 4])), draw(st.integers(1, 3))


@given(steps())
@settings(max_examples=150)
def test_random_ragged_segments(drawn: tuple[StepCase, str, int, int]) -> None:
    case, decode, sink, count = drawn
    with threads(count):
        check_step(by_kernel, case, decode, sink)


@pytest.mark.parametrize("decode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps_keep_the_same_books(decode: str, dtype: torch.dtype) -> None:
    check_many_steps(by_op, decode, dtype)


def test_of_equals_the_earlier_position_goes() -> None:
    """All keys alike: every entry is looked at the same, and slots are in no order."""
    case = random_step(batch=3, kv_heads=2, group=2, dim=16, longest=40, seed=5)
    case.state.key_arena.fill_(0.5)
    case.key.fill_(0.5)
    output, state = stepped(case, "fixed")
    _, books = plain(case, "fixed")
    same_books(state, books)
    assert bool((state.slot_position == -1).sum() > 0) and bool(output.isfinite().all())


def test_logits_far_apart() -> None:
    case = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=50, seed=1)
    case = dataclasses.replace(case, query=case.query * 100)
    output, _ = stepped(case, "keep")
    torch.testing.assert_close(output, plain(case, "keep")[0])


def test_queries_and_keys_as_projections_lay_them_out() -> None:
    case = random_step(batch=2, kv_heads=2, group=3, dim=64, longest=40, seed=2)
    apart = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    apart["query"] = torch.cat([apart["query"], apart["query"]], dim=1)[:, : case.query.shape[1]]  # of a fused projection
    check_step(by_kernel, dataclasses.replace(case, **apart), "ratio")


def test_it_is_the_op() -> None:
    case = random_step(batch=2, kv_heads=2, group=2, dim=64, longest=30)
    called: list[int] = []
    step = cpu_decode.decode_step_by
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_decode, "decode_step_by", lambda *args: called.append(1) or step(*args))
        args = (case.query, case.key, case.value, *case.state, case.layer, case.scale, "ratio", 4)
        library.opcheck(torch.ops.tgvkv.decode_step.default, args)
    assert called


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_dtype_goes_the_plain_way(dtype: torch.dtype) -> None:
    case = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=20, dtype=dtype)
    assert cpu_decode.kernel_for(case.query, case.key, case.value, case.state) is None
    args = (case.query, case.key, case.value, *case.fresh(), case.layer, case.scale, "ratio", 4)
    assert torch.equal(torch.ops.tgvkv.decode_step(*args), plain(case, "ratio")[0])


def test_a_step_of_another_dtype_than_the_cache_goes_the_plain_way() -> None:
    """As under autocast."""
    case = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=20)
    case = dataclasses.replace(case, key=case.key.bfloat16())
    assert cpu_decode.kernel_for(case.query, case.key, case.value, case.state) is None


def test_without_a_compiler_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no g++")

    monkeypatch.setattr(compiled, "load_cpp", fail)
    case = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=20)
    compiled.compiled.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="tgvkv_compile"):
            for _ in range(2):
                args = (case.query, case.key, case.value, *case.fresh(), case.layer, case.scale, "ratio", 4)
                assert torch.equal(torch.ops.tgvkv.decode_step(*args), plain(case, "ratio")[0])
        assert len(caplog.messages) == 1 and "no g++" in caplog.messages[0]
    finally:
        compiled.compiled.cache_clear()
