"""The line that is shown while a graph is compiled."""

import io
import logging
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.cli.compiling import compiling_shown, waiting_shown


def answer() -> None:
    model = make_model(Shape(layers=2))
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    run(model, make_inputs(((5, 9),)), 2)


def test_it_says_which_graph_and_for_how_long_and_is_gone_afterwards() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    with compiling_shown(console):
        answer()
    text = written.getvalue()
    assert "compiling: prefill graph of 2 layers" in text and "compiling: decode graph of 2 layers" in text
    assert "0:00:00" in text
    assert text.count("\x1b[2K") >= 2  # each line is erased
    assert logging.getLogger("tgvkv_compile").handlers == []


def test_it_says_of_which_model_and_who_waits_for_it() -> None:
    written = io.StringIO()
    with (
        compiling_shown(Console(file=written, force_terminal=True, width=80), what="20 % of all"),
        waiting_shown("first answer"),
    ):
        answer()
    text = written.getvalue()
    assert "compiling for 20 % of all: first answer" in text
    assert "compiling for 20 % of all: decode graph of 2 layers" in text


def test_a_bar_makes_room_and_comes_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = Progress(console=console, transient=True)
    with bar, compiling_shown(console, beside=bar):
        assert bar.live.is_started
        with waiting_shown("one thing"):
            assert not bar.live.is_started
            with waiting_shown("another"):
                assert not bar.live.is_started
            assert not bar.live.is_started
        assert bar.live.is_started


def test_nothing_is_written_where_nobody_looks() -> None:
    written = io.StringIO()
    with compiling_shown(Console(file=written, force_terminal=False)):
        answer()
    assert not written.getvalue()


def test_the_log_says_it_too(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, "tgvkv_compile"):
        answer()
    assert "compiling a prefill graph of 2 layers" in caplog.text and "compiled a decode graph of 2 layers in" in caplog.text

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(programs, "lower_rewritten", fails)
    with caplog.at_level(logging.INFO, "tgvkv_compile"), pytest.raises(RuntimeError, match="no compiler"):
        answer()
    assert "failed to compile a prefill graph of 2 layers" in caplog.text
