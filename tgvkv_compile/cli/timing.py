"""How long a decode step takes."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


def median_step(model: Any, inputs: Mapping[str, Tensor], steps: int) -> float:
    """Median seconds of a decode step of `generate`; the prompt's own pass is not among them.

    Answers are not let end early, so that whatever model is timed decodes as many tokens.

    Args:
        model: Compiled or not; what compiles in the first steps is outvoted by the median.
        inputs: What `generate` takes.
        steps: How many steps; some more than compile.
    """
    clock = _Clock()
    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=steps + 1,
            max_new_tokens=steps + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return statistics.median(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))


class _Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
