"""Hand-written greedy decoding that looks into the cache after every step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.runtime.inspect import inspect_cache

Kept = list[list[list[int]]]
"""Positions, per sample and layer."""


@dataclasses.dataclass
class Trace:
    """What a greedy run did.

    Attributes:
        logits: `[B, vocabulary]`, of the prompt's last token, then of each step.
        kept: After the prefill, then after each step.
        tokens: `[B]`, the best token of each of `logits`.
        cache: As the run left it.
        mask: `[B, S]` int64, the attention mask that belongs to it.
    """

    logits: list[Tensor] = dataclasses.field(default_factory=list)
    kept: list[Kept] = dataclasses.field(default_factory=list)
    tokens: list[Tensor] = dataclasses.field(default_factory=list)
    cache: Any = None
    mask: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    @property
    def lengths(self) -> list[list[list[int]]]:
        """Entries per step, sample and layer."""
        return [[[len(layer) for layer in sample] for sample in kept] for kept in self.kept]

    @property
    def continuation(self) -> Tensor:
        """The tokens as `[B, steps + 1]`."""
        return torch.stack(self.tokens, dim=1)

    def add(self, logits: Tensor, kept: Kept) -> Tensor:
        """Takes note of a call; gives its best tokens, `[B]`."""
        self.logits.append(logits.detach().clone())
        self.kept.append(kept)
        self.tokens.append(logits.argmax(-1))
        return self.tokens[-1]


def kept_of(cache: Any) -> Kept:
    """What `inspect_cache` says."""
    report = inspect_cache(cache)
    return [
        [report.kept_positions(layer, sample).tolist() for layer in range(report.num_layers)]
        for sample in range(report.batch_size)
    ]


def positions_of(mask: Tensor) -> Tensor:
    """Position ids as `generate` makes them from an attention mask."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def traced_generate(
    model: Any, inputs: dict[str, Tensor], steps: int, look: Callable[[Any, Tensor], Kept] | None = None, **options: Any
) -> Trace:
    """A prompt and `steps` decode steps through stock `generate`, with a look into the cache after every call.

    Args:
        model: A transformers model.
        inputs: Of the prompt.
        steps: How many.
        look: Given the cache and the attention mask of what is in it, tells what is kept; `kept_of` by default.
        **options: Of `generate`.
    """
    trace, kept = Trace(), []
    update = model._update_model_kwargs_for_generation

    def looking(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        trace.cache, mask = outputs.past_key_values, model_kwargs.get("attention_mask")
        # `generate` leaves out a mask that masks nothing.
        length = (inputs["input_ids"].shape[0], trace.cache.get_seq_length())
        trace.mask = mask if mask is not None else torch.ones(length, dtype=torch.int64)
        kept.append(look(trace.cache, trace.mask) if look is not None else kept_of(trace.cache))
        return update(outputs, model_kwargs, *args, **kwargs)

    model._update_model_kwargs_for_generation = looking  # `generate` calls it after every call of the model
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    finally:
        del model._update_model_kwargs_for_generation
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    for logits, of_call, token in zip(output.logits, kept, tokens.unbind(1), strict=True):
        assert torch.equal(trace.add(logits.float(), of_call), token)
    return trace


@torch.no_grad()
def run(
    model: Any,
    inputs: dict[str, Tensor],
    steps: int,
    *,
    forced: Sequence[Tensor] | None = None,
    give_mask: bool = True,
    give_positions: bool = True,
    on_step: Any = None,
) -> Trace:
    """Prefill and `steps` decode steps.

    Args:
        model: Called directly.
        inputs: Of the prompt.
        steps: How many.
        forced: Tokens to go on with, `[B]` per step, instead of the best.
        give_mask: Pass the attention mask (`generate` leaves out one that masks nothing).
        give_positions: Pass position ids (`generate` does).
        on_step: Called with the cache after each call.
    """
    trace = Trace(mask=inputs["attention_mask"])
    return _go_on(
        model, trace, inputs, steps, forced=forced, give_mask=give_mask, give_positions=give_positions, on_step=on_step
    )


@torch.no_grad()
def second_turn(
    model: Any, cache: Any, mask: Tensor, question: Tensor | dict[str, Tensor], steps: int, **options: Any
) -> Trace:
    """A further turn, all of it at once, on a cache that is in use; then `steps` decode steps.

    Args:
        model: Called directly.
        cache: The cache.
        mask: `[B, S]`, what is in it.
        question: `[B, Q]` tokens, or inputs of the turn: `input_ids`, its `attention_mask` and `pixel_values`.
        steps: How many.
        **options: Of `run`.
    """
    inputs = question if isinstance(question, dict) else {"input_ids": question}
    new = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    trace = Trace(cache=cache, mask=torch.cat([mask, new], dim=1))
    return _go_on(model, trace, inputs, steps, **options)


def _go_on(
    model: Any,
    trace: Trace,
    inputs: dict[str, Tensor],
    steps: int,
    *,
    forced: Sequence[Tensor] | None = None,
    give_mask: bool = True,
    give_positions: bool = True,
    on_step: Any = None,
) -> Trace:
    for step in range(steps + 1):
        given = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if give_mask:
            given["attention_mask"] = trace.mask
        if give_positions:
            given["position_ids"] = positions_of(trace.mask)[:, -given["input_ids"].shape[1] :]
        if trace.cache is not None:
            given["past_key_values"] = trace.cache
        output = model(**given, use_cache=True)
        trace.cache = output.past_key_values
        best = trace.add(output.logits[:, -1].float(), kept_of(trace.cache))
        if on_step is not None:
            on_step(trace.cache)
        if step < steps:
            token = forced[step] if forced is not None else best
            inputs = {"input_ids": token[:, None]}
            trace.mask = torch.cat([trace.mask, torch.ones_like(token[:, None])], dim=1)
    return trace
