"""The C++ compiler beside Python: kernels are there when all graphs are lowered, and the processor is probed once."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch.fx import symbolic_trace

from tests.support.models import make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.lower import beside


def lowered_by_inductor(function: Any, *inputs: torch.Tensor) -> Any:
    with torch.no_grad():
        return torch._inductor.compile(symbolic_trace(function), list(inputs))


def test_kernels_are_there_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[list[str]] = []
    wait = AsyncCompile._wait_futures

    def counted(self: AsyncCompile, scope: dict[str, Any]) -> None:
        waited.append([name for name in scope if name.startswith("cpp_")])
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "_wait_futures", counted)
    rows = torch.randn(7, 5)
    with torch._inductor.utils.fresh_cache(), beside.kernels_beside():
        first = lowered_by_inductor(lambda rows: (rows.sin() + rows.sum(1, keepdim=True),), rows)
        second = lowered_by_inductor(lambda rows: (rows.cos() * rows.amax(0),), rows)
        assert waited == []
    assert len(waited) == 2 and all(waited)
    torch.testing.assert_close(first(rows)[0], rows.sin() + rows.sum(1, keepdim=True))
    torch.testing.assert_close(second(rows)[0], rows.cos() * rows.amax(0))
    assert AsyncCompile._wait_futures is counted


def test_an_error_leaves_inductor_as_it_was() -> None:
    wait = AsyncCompile._wait_futures
    with pytest.raises(ZeroDivisionError), beside.kernels_beside():
        raise ZeroDivisionError
    assert AsyncCompile._wait_futures is wait


@pytest.fixture
def not_yet_probed() -> Iterator[None]:
    beside.probe_processor.cache_clear()
    yield
    beside.probe_processor.cache_clear()


@pytest.mark.usefixtures("not_yet_probed")
def test_the_processor_is_probed_for_a_cpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    finish = threading.Event()

    def find() -> list[str]:
        finish.wait(5)
        probed.append(threading.current_thread().name)
        return probed

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", find)
    for later in ("precompile_header", "compiled"):  # they ask as well, from a thread of their own
        monkeypatch.setattr(beside, later, lambda: None)
    beside.prepare_inductor(torch.nn.Linear(2, 2, device="meta"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    beside.prepare_inductor()
    assert cpu_vec_isa.valid_vec_isa_list is find
    for _ in range(2):
        beside.prepare_inductor(torch.nn.Linear(2, 2))
    assert probed == []
    finish.set()
    assert cpu_vec_isa.valid_vec_isa_list() == ["tgvkv-probe", "MainThread"]  # who asks waits, and asks Inductor
    assert cpu_vec_isa.valid_vec_isa_list is find


@pytest.mark.usefixtures("not_yet_probed")
def test_whoever_asks_for_what_cannot_be_found_out_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", fail)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    beside.prepare_inductor()
    with pytest.raises(OSError, match="no compiler"):
        cpu_vec_isa.valid_vec_isa_list()


def test_other_lowerings_probe_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.nn.Module | None] = []
    monkeypatch.setattr("tgvkv_compile.backend.backend.prepare_inductor", lambda model=None: asked.append(model))
    model, inputs = make_model(), make_inputs(((3, 4),))
    model.compile(backend=tgvkv_backend(0.5, lowering="eager"))
    run(model, inputs, 1)
    assert asked == []
    backend = tgvkv_backend(0.5)
    monkeypatch.setattr(backend.cut, "decode", lambda *_: (_ for _ in ()).throw(InterruptedError))
    model.compile(backend=backend)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            model(**inputs)
    assert asked == [None, model]
