"""A compiled model that is asked one thing after the other, each answer held against the oracle, graphs counted."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.family import IMAGE, VIDEO
from tests.support.comparing import assert_same_run
from tests.support.reference import ReferenceTrace, Session
from tests.support.running import run, traced_generate
from tests.support.sharing import Sharing
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.config import EvictionConfig

CONFIG = EvictionConfig(0.3)
STEPS = 3
TRIES = 20
MAIN = "main"
WHOLE = "whole"


STATIC_BATCH = ("lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe")
"""Linear attention: where a process begins with a batch, the first decode graph is of that batch size alone, the second serves
all. After a single prompt it is one, as everywhere."""


def batches_first(name: str, graphs: dict[str, int]) -> dict[str, int]:
    """The graphs of a process that begins with batches, of those of one that begins with single prompts."""
    return {**graphs, "decode": graphs["decode"] + (name in STATIC_BATCH)}


def backend_of(config: EvictionConfig) -> Any:
    return tgvkv_backend(config.budget, ranking=config.ranking, lowering="eager")


class Process:
    """One model, compiled once.

    Args:
        make_model: Makes it, and the same again for the oracle.
        make_inputs: Of the model, prompts and a seed, makes what its processor would.
        monkeypatch: Of the test.
        others: Further options that requests may name, besides `CONFIG`.

    Attributes:
        lowered: How many graphs were lowered, by whose options they were.
    """

    def __init__(
        self,
        make_model: Callable[[], Any],
        make_inputs: Callable[[Any, Any, int], dict[str, Tensor]],
        monkeypatch: pytest.MonkeyPatch,
        others: Mapping[str, EvictionConfig] = {},
    ) -> None:
        self._make_model, self._make_inputs = make_model, make_inputs
        self._configs = {MAIN: CONFIG, **others}
        self.model = make_model()
        self._backends = {name: backend_of(config) for name, config in self._configs.items()}
        self._sharing = Sharing(self.model, self._backends[MAIN])
        self._options = MAIN
        self.lowered = dict.fromkeys(self._configs, 0)
        self._asked = 0
        lower = programs.lower_rewritten

        def counted(*args: Any, **options: Any) -> Any:
            self.lowered[self._options] += 1
            return lower(*args, **options)

        monkeypatch.setattr(programs, "lower_rewritten", counted)

    @contextlib.contextmanager
    def _asking(self, options: str) -> Iterator[None]:
        self._options, self._sharing.asked = options, self._backends[options]
        yield
        self._options, self._sharing.asked = MAIN, self._backends[MAIN]

    def generate(self, *requests: Any, steps: int = STEPS, options: str = MAIN) -> None:
        """Each through `generate`."""
        with self._asking(options):
            for prompts in requests:
                inputs, wanted = self._question(prompts, steps)
                assert_same_run(traced_generate(self.model, inputs, steps), wanted)

    def generate_whole(self, inputs: dict[str, Tensor], steps: int, *, options: str) -> None:
        """Through `generate`, with the whole budget: nothing is evicted, and the answer is the uncompiled model's."""
        assert self._configs[options].budget == 1.0
        with self._asking(options):
            found = traced_generate(self.model, inputs, steps)
        wanted = traced_generate(self._make_model(), inputs, steps, lambda *_: [])
        assert torch.equal(found.continuation, wanted.continuation)
        for logits, dense in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
        for length, layers in zip((inputs["attention_mask"].sum(1) + steps).tolist(), found.kept[-1], strict=True):
            assert all(layer == list(range(length)) for layer in layers)

    def call(self, *requests: Any, steps: int = STEPS, give_mask: bool = False) -> None:
        """Each by direct calls, as far as `steps`; positions are left to the model."""
        for prompts in requests:
            inputs, wanted = self._question(prompts, steps)
            assert_same_run(run(self.model, inputs, steps, give_mask=give_mask, give_positions=False), wanted)

    def graphs(self, options: str = MAIN) -> dict[str, int]:
        """What dynamo handed over; what is compressed of it was lowered, and once."""
        graphs = dict(self._backends[options].graphs)
        compressed = graphs.get("prefill", 0) + graphs.get("decode", 0)
        assert self.lowered[options] == compressed, f"{self.lowered[options]} lowerings of {graphs}"
        return graphs

    def _question(self, prompts: Any, steps: int) -> tuple[dict[str, Tensor], ReferenceTrace]:
        self._asked += 1
        for seed in range(self._asked, self._asked + 100 * TRIES, 100):
            inputs = self._make_inputs(self.model, prompts, seed)
            wanted = Session(self._make_model(), self._configs[self._options], image_token=(IMAGE, VIDEO)).generate(
                inputs, steps
            )
            if wanted.fragile == [None] * len(prompts):  # else float noise decides what is kept: other pictures
                if bool((inputs["input_ids"][0] == IMAGE).any()):
                    assert min(wanted.lengths[0][0]) < int(inputs["attention_mask"][0].sum()), "nothing is evicted"
                return inputs, wanted
        raise AssertionError(f"no pictures were found for {prompts} whose evictions float noise could not change")


def added(*counts: dict[str, int]) -> dict[str, int]:
    """Of each kind, all of them."""
    return {kind: sum(count[kind] for count in counts) for kind in counts[0]}
