"""One request by hand: prefill, then tokens, each fed the one before, as `generate` does."""

import time
from typing import Any

import torch
from torch import Tensor

from bench.contenders import Contender
from bench.models import Prompt, positions
from bench.presets import Preset


class Request:
    """A request that is being answered.

    Attributes:
        cache: As the last call left it.
        prefill_s: Seconds of its prefill; None for a lower bound, which has none.
    """

    def __init__(self, contender: Contender, preset: Preset, prompt: Prompt, room: int) -> None:
        """Runs the prefill.

        Args:
            contender: How to run the model.
            preset: Of the model.
            prompt: What it asks.
            room: Decode steps that may follow.
        """
        self._contender, self._preset, self._prompt = contender, preset, prompt
        self.cache: Any = contender.new_cache(prompt, room)
        self.prefill_s: float | None = None
        self._next = torch.full((prompt.batch, 1), 17, device=preset.device)
        self._position = prompt.length
        if contender.prefill is not None:
            self.prefill_s = self._prefill(contender.prefill)

    def decode(self, steps: int) -> float:
        """Seconds of a step, on average over `steps` of them. The device is waited for once, at their end."""
        synchronise(self._preset.device)
        begun = time.perf_counter()
        for _ in range(steps):
            self._step()
        synchronise(self._preset.device)
        return (time.perf_counter() - begun) / steps

    @torch.no_grad()
    def _prefill(self, call: Any) -> float:
        # A shallow copy: models write into this dictionary.
        inputs = self._prompt.call_inputs()
        if self.cache is not None:
            inputs["past_key_values"] = self.cache
        at = positions(self._preset, self._prompt.batch, 0, self._prompt.length)
        synchronise(self._preset.device)
        begun = time.perf_counter()
        out = call(position_ids=at, **inputs)
        self._take(out)
        synchronise(self._preset.device)
        return time.perf_counter() - begun

    @torch.no_grad()
    def _step(self) -> None:
        if self._preset.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        at = positions(self._preset, self._prompt.batch, self._position, 1)
        out = self._contender.decode(
            input_ids=self._next, position_ids=at, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self._position += 1
        self._take(out)

    def _take(self, out: Any) -> None:
        self.cache = out.past_key_values
        logits: Tensor = out.logits
        self._next = logits[:, -1:].argmax(-1)  # a tensor of its own: CUDA graphs overwrite the logits


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
