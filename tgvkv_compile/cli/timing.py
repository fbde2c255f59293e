"""How long an answer takes: the prompt's own pass, a decode step, all of it."""

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

CACHE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one answer by `generate`.

    Attributes:
        prompt_ms: Until the first token was there.
        step_ms: Median time of a decode step.
        seconds: Until the last token was there.
    """

    prompt_ms: float
    step_ms: float
    seconds: float


def timed_answer(model: Any, inputs: Mapping[str, Tensor], steps: int) -> tuple[Times, Any]:
    """Has one batch answered; times, and what `generate` returned.

    Answers are not let end early, so that whatever model is timed decodes as many tokens.

    Args:
        model: Compiled or not; what compiles in the first steps is outvoted by the median.
        inputs: What `generate` takes.
        steps: How many decode steps, the prompt's own pass not counted.
    """
    clock = _Clock()
    begun = time.perf_counter()
    with torch.inference_mode():
        result = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=steps + 1,
            max_new_tokens=steps + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
        )
    step = statistics.median(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))
    return Times(1000 * (clock.times[0] - begun), 1000 * step, clock.times[-1] - begun), result


def median_times(times: list[Times]) -> Times:
    """Each figure's median over several answers."""
    columns = zip(*(dataclasses.astuple(one) for one in times), strict=True)
    return Times(*(statistics.median(column) for column in columns))


@contextlib.contextmanager
def cold_caches() -> Iterator[None]:
    """An empty folder for Inductor's caches, so that compile times do not depend on what was run before; gone afterwards."""
    before = os.environ.get(CACHE_FOLDER)
    with tempfile.TemporaryDirectory(prefix="tgvkv-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_FOLDER] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_FOLDER]
            else:
                os.environ[CACHE_FOLDER] = before


class _Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
