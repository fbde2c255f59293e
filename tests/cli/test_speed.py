"""What the demonstration says of speeds; the figures are made up."""

import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tgvkv_compile.cli.compiling import waiting_shown
from tgvkv_compile.cli.demo import first_answer
from tgvkv_compile.cli.results import Settings, print_speed
from tgvkv_compile.cli.speed import ROUNDS, Contender, Speed, race, verdicts
from tgvkv_compile.cli.timing import CACHE_FOLDER, Times, cold_caches, median_times

INPUTS = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}


class Model:
    """Answers by waiting; its first answer is compiled."""

    def __init__(self, step_ms: float, turns: list[float]) -> None:
        self.step_ms, self.turns, self.compiled = step_ms, turns, False

    def generate(self, *, max_new_tokens: int, stopping_criteria: Any, **inputs: Any) -> Any:
        if not self.compiled:
            with waiting_shown("prefill graph"):
                time.sleep(0.3)
        self.compiled = True
        self.turns.append(self.step_ms)
        for _ in range(max_new_tokens):
            time.sleep(self.step_ms / 1000)
            stopping_criteria[0](inputs["input_ids"], None)
        return SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(3, 1, 4, 2), values=torch.zeros(3, 1, 4, 2))])


def speed(name: str, step_ms: float, *, seconds: float = 1.0, prompt_ms: float = 300.0, size: int = 100) -> Speed:
    budget = 0.2 if name.startswith("tgvkv") else None
    later = Times(prompt_ms, step_ms, seconds)
    return Speed(name, budget, None if budget is None else "all", "uncompiled" not in name, 30.0, later, 50, size)


def against(*ours: Speed, uncompiled: float = 20.0, compiled: float = 10.0) -> list[str]:
    return verdicts([speed("full KV, uncompiled", uncompiled), speed("full KV, torch.compile", compiled), *ours])


def test_a_gain_is_told_against_the_fastest_of_the_others() -> None:
    (said,) = against(speed("tgvkv, 20 %", 5.0, seconds=0.5, size=25))
    assert said.startswith("tgvkv, 20 %: 2.00 x the tokens/s of full KV, torch.compile, the fastest")
    assert "takes 0.50 x the time of" in said and "It holds 25% of the KV bytes." in said
    assert "NOT" not in said and "no gain" not in said and "slower" not in said and "prompt takes" not in said
    (said,) = against(speed("tgvkv, 20 %", 5.0), uncompiled=8.0)
    assert "1.60 x the tokens/s of full KV, uncompiled" in said


def test_a_loss_is_told_plainly() -> None:
    (said,) = against(speed("tgvkv, 20 %", 20.0, seconds=1.5, prompt_ms=450.0))
    assert "NOT faster; 0.50 x the tokens/s of full KV, torch.compile." in said
    assert "takes 1.50 x the time of full KV, uncompiled: slower; its prompt takes 1.50 x." in said


def test_no_difference_is_no_gain() -> None:
    (said,) = against(speed("tgvkv, 20 %", 9.9, seconds=0.98))
    assert "no gain in tokens/s (1.01 x those of full KV, torch.compile)" in said
    assert "takes 0.98 x the time of full KV, uncompiled: no gain." in said


def test_a_fast_step_does_not_hide_a_slow_answer() -> None:
    (said,) = against(speed("tgvkv, 20 %", 5.0, seconds=1.2, prompt_ms=600.0))
    assert "2.00 x the tokens/s" in said
    assert "takes 1.20 x the time of full KV, uncompiled: slower; its prompt takes 2.00 x." in said


def test_every_budget_is_judged() -> None:
    said = against(speed("tgvkv, 20 %", 5.0), speed("tgvkv, 5 %", 15.0))
    assert len(said) == 2
    assert said[0].startswith("tgvkv, 20 %: 2.00 x") and said[1].startswith("tgvkv, 5 %: NOT faster")


def printed(speeds: Sequence[Speed], lowering: str) -> str:
    written = io.StringIO()
    settings = Settings(50, (0.2,), ("all",), lowering, "ratio", 0, Path("picture.png"), None)  # type: ignore[arg-type]
    print_speed(Console(file=written, width=200), speeds, 276, 5 << 20, settings)
    return written.getvalue()


@pytest.mark.parametrize(("step_ms", "words"), [(5.0, "2.00 x the tokens/s"), (20.0, "NOT faster")])
def test_the_table_has_compilation_in_a_column_of_its_own_and_the_verdict_below(step_ms: float, words: str) -> None:
    others = [speed("full KV, uncompiled", 20.0), speed("full KV, torch.compile", 10.0, size=40 << 20)]
    text = printed([*others, speed("tgvkv, 20 % of all", step_ms)], "inductor")
    assert "50 questions of 276 tokens at once" in text
    (row,) = [line for line in text.splitlines() if line.startswith("full KV, torch.compile")]
    assert row.split()[3:] == ["30.0", "1.00", "300", "10.0", "5000", "40.0"]
    assert words in text
    assert "A step reads 40 MiB of full KV and 5 MiB of weights." in text
    assert "not Inductor's" not in text


def test_a_debugging_lowering_is_told_for_what_it_is() -> None:
    assert "not Inductor's" in printed([speed("full KV, uncompiled", 20.0), speed("tgvkv, 20 %", 5.0)], "eager")


def test_each_figure_has_its_own_median() -> None:
    assert median_times([Times(1, 9, 5), Times(2, 8, 3), Times(9, 1, 4)]) == Times(2, 8, 4)


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_caches_are_cold_and_the_users_folder_comes_back(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv(CACHE_FOLDER, raising=False)
    else:
        monkeypatch.setenv(CACHE_FOLDER, before)
    with cold_caches():
        folder = Path(os.environ[CACHE_FOLDER])
        assert folder.is_dir() and not list(folder.iterdir())
    assert not folder.exists()
    assert os.environ.get(CACHE_FOLDER) == before


def test_contenders_take_turns_and_compilation_is_in_the_first_answer_alone() -> None:
    turns: list[float] = []
    contenders = [Contender(None, None, None, Model(1, turns)), Contender(0.2, "all", "tgvkv", Model(5, turns))]
    quiet = Console(file=io.StringIO())
    first = [first_answer(quiet, one, INPUTS) for one in contenders]
    advanced: list[int] = []
    one, other = race(contenders, first, INPUTS, lambda: advanced.append(1))
    assert turns == [1, 5, *[1, 5, 5, 1] * ROUNDS][: 2 + 2 * ROUNDS]
    assert len(advanced) == 2 * ROUNDS
    assert (one.name, other.name) == ("full KV, uncompiled", "tgvkv, 20 % of all")
    assert min(first) > 0.3
    assert 1 <= one.later.step_ms < other.later.step_ms
    assert one.later.seconds < first[0] and one.later.prompt_ms < 300
    assert one.tokens_per_second == 3000 / one.later.step_ms
    assert one.physical_bytes == 2 * 3 * 4 * 2 * 4


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_first_answer_waits_for_is_shown(terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, highlight=False)
    first_answer(console, Contender(None, None, "torch.compile", Model(1, [])), INPUTS)
    text = written.getvalue()
    assert ("compiling for full KV, torch.compile: graphs of the first answer" in text) is terminal
    assert ("compiling for full KV, torch.compile: prefill graph" in text) is terminal
    assert "full KV, torch.compile: first answer after 0." in text
