"""Capacities from what budgeting wants of sample prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tgvkv_compile.backend import dynamo
from tgvkv_compile.backend.apart import compile_apart
from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.backend.wrappers import module_of
from tgvkv_compile.config import check_count, read_eviction
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan, check_exportable
from tgvkv_compile.ops.eviction.budgeting import segment_capacity
from tgvkv_compile.runtime.inspect import inspect_cache


def calibrate(
    model: torch.nn.Module,
    samples: Sequence[Mapping[str, Any]],
    budget: float | int | None = None,
    *,
    max_new_tokens: int,
    slack: float = 0.25,
    max_prompt: int | None = None,
    **eviction: Any,
) -> BudgetPlan:
    """Makes a plan from sample prompts: per layer, the most that any of them wants, decode growth and slack.

    Runs the prefill of each sample through the passes, uncompiled. The model stays as it is. None of the samples is clipped
    by the plan.

    Args:
        model: A transformers vision-language model; it may be compiled.
        samples: Inputs of calls, as the processor makes them, each with a picture.
        budget: As for `tgvkv_backend`.
        max_new_tokens: The most decode steps.
        slack: Share of a capacity that is added to it, for prompts that want more than the samples do.
        max_prompt: The longest prompt, in tokens; the longest sample by default. Where it is longer, what the samples want
            is scaled by length.
        **eviction: The other fields of `EvictionConfig`; functions of one's own cannot be exported.

    Raises:
        ConfigError: An option is out of range, there is no sample, or one holds no picture.
        UnsupportedGraphError: The model cannot be rewritten.
    """
    config = read_eviction(budget, eviction, where="calibrate")
    check_exportable(config)
    check_count("max_new_tokens", max_new_tokens, minimum=0)
    if isinstance(slack, bool) or not isinstance(slack, (int, float)) or not 0.0 <= slack < math.inf:
        raise ConfigError(f"slack={slack!r} must be a number >= 0: the share of a capacity that is added to it")
    if isinstance(samples, Mapping) or not samples:
        raise ConfigError(
            f"samples={type(samples).__name__} must be a sequence of at least one call's inputs, such as [inputs]"
        )
    model = module_of(model)
    backend = tgvkv_backend(
        budget,
        **eviction,
        lowering="eager",
        configure_dynamo=False,
    )
    run = compile_apart(model._call_impl, backend)
    longest, wishes = 1, []
    for number, sample in enumerate(samples):
        with torch.no_grad(), dynamo.configured():
            report = inspect_cache(run(**{**sample, "use_cache": True}))
        if not report.compressed:
            raise ConfigError(f"samples[{number}] holds no picture, so no layer wants anything; give prompts with vision")
        lengths = torch.full((report.batch_size,), report.logical_length)  # padding counted: never less than what is there
        wish = segment_capacity(report.segment_lengths, report.keep_rates, lengths, max_new_tokens, config=config)
        wishes.append(wish.amax(0))
        longest = max(longest, report.logical_length)
    max_prompt = longest if max_prompt is None else max_prompt
    check_count("max_prompt", max_prompt, minimum=longest)
    wanted = torch.stack(wishes).amax(0) * (max_prompt / longest) * (1.0 + slack)
    capacities = tuple(min(math.ceil(slots), max_prompt + max_new_tokens) for slots in wanted.tolist())
    return BudgetPlan(capacities, max_prompt, max_new_tokens, config)
