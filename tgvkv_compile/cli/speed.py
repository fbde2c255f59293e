"""Speed of several ways to run the model, all on the same batch, and what may be concluded from it.

A way to run the model is a `Contender`. What it waits for its compiler is its first answer's time, and in no other figure:
all others are medians of later answers, for which contenders take turns, so that what else the machine does hits all alike.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tgvkv_compile.cli.report import budget_label
from tgvkv_compile.cli.timing import Times, median_times, timed_answer
from tgvkv_compile.config import BudgetOf
from tgvkv_compile.runtime.inspect import inspect_cache

STEPS = 15
ROUNDS = 3
NOISE = 0.05
"""Differences that are smaller are none."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        budget: KV kept; None for the full cache.
        budget_of: What `budget` is a fraction of.
        compiler: Who compiled the model; None for nobody.
        model: The model itself.
    """

    budget: float | int | None
    budget_of: BudgetOf | None
    compiler: str | None
    model: Any

    @property
    def name(self) -> str:
        """`tgvkv, 20 % of all`, `full KV, torch.compile`, `full KV, uncompiled`."""
        if self.budget is None:
            return f"full KV, {self.compiler or 'uncompiled'}"
        return f"tgvkv, {budget_label(self.budget)} of {self.budget_of}"


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a contender was.

    Attributes:
        name: Of the contender.
        budget: KV kept; None for the full cache.
        budget_of: What `budget` is a fraction of.
        compiled: Whether the first answer had to wait for a compiler.
        first_seconds: The first answer, compilation included.
        later: Medians of later answers.
        rows: Rows of the batch.
        physical_bytes: What the cache occupied after an answer.
    """

    name: str
    budget: float | int | None
    budget_of: BudgetOf | None
    compiled: bool
    first_seconds: float
    later: Times
    rows: int
    physical_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Rows of the batch per decode step."""
        return 1000 * self.rows / self.later.step_ms


def race(
    contenders: Sequence[Contender],
    first_seconds: Sequence[float],
    inputs: Mapping[str, Tensor],
    advance: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Times contenders that have answered this batch before, interleaved.

    Args:
        contenders: Who runs.
        first_seconds: How long the first answer of each took.
        inputs: What `generate` takes.
        advance: Told after each answer.
    """
    times: list[list[Times]] = [[] for _ in contenders]
    held = [0] * len(contenders)
    for turn in range(ROUNDS):
        for place in range(len(contenders)):
            who = (place + turn) % len(contenders)
            taken, result = timed_answer(contenders[who].model, inputs, STEPS)
            times[who].append(taken)
            held[who] = inspect_cache(result).physical_bytes
            del result  # not beside the next one's cache
            advance()
    return [
        Speed(
            name=one.name,
            budget=one.budget,
            budget_of=one.budget_of,
            compiled=one.compiler is not None,
            first_seconds=first,
            later=median_times(taken),
            rows=len(inputs["input_ids"]),
            physical_bytes=size,
        )
        for one, first, taken, size in zip(contenders, first_seconds, times, held, strict=True)
    ]


def verdicts(speeds: Sequence[Speed]) -> list[str]:
    """What the figures say of each budget, gain or none: against the fastest of those that hold the full cache."""
    full = [one for one in speeds if one.budget is None]
    steps = min(full, key=lambda one: one.later.step_ms)
    answers = min(full, key=lambda one: one.later.seconds)
    return [
        f"{_steps(one, steps)} {_answers(one, answers)} {_memory(one, answers)}" for one in speeds if one.budget is not None
    ]


def _steps(one: Speed, other: Speed) -> str:
    ratio = other.later.step_ms / one.later.step_ms
    if ratio > 1 + NOISE:
        return f"{one.name}: {ratio:.2f} x the tokens/s of {other.name}, the fastest that holds all KV."
    if ratio < 1 - NOISE:
        return f"{one.name}: NOT faster; {ratio:.2f} x the tokens/s of {other.name}."
    return f"{one.name}: no gain in tokens/s ({ratio:.2f} x those of {other.name})."


def _answers(one: Speed, other: Speed) -> str:
    ratio = one.later.seconds / other.later.seconds
    prompt = one.later.prompt_ms / other.later.prompt_ms
    what = f"A whole answer of {STEPS + 1} tokens, prompt included, takes {ratio:.2f} x the time of {other.name}"
    if ratio > 1 + NOISE:
        what += ": slower"
    elif ratio > 1 - NOISE:
        what += ": no gain"
    if prompt > 1 + NOISE:
        what += f"; its prompt takes {prompt:.2f} x"
    return what + "."


def _memory(one: Speed, other: Speed) -> str:
    return f"It holds {one.physical_bytes / other.physical_bytes:.0%} of the KV bytes."
