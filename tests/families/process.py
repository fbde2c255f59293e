"""A compiled model that is asked one thing after the other, each answer held against the oracle, graphs counted."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tests.families.family import IMAGE, VIDEO
from tests.support.comparing import assert_same_run
from tests.support.reference import ReferenceTrace, Session
from tests.support.running import run, traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.config import EvictionConfig

CONFIG = EvictionConfig(0.3)
STEPS = 3
TRIES = 20


class Process:
    """One model, compiled once.

    Args:
        make_model: Makes it, and the same again for the oracle.
        make_inputs: Of the model, prompts and a seed, makes what its processor would.
        monkeypatch: Of the test.
        config: The budget, and which tokens stay.

    Attributes:
        lowered: How many graphs were lowered.
    """

    def __init__(
        self,
        make_model: Callable[[], Any],
        make_inputs: Callable[[Any, Any, int], dict[str, Tensor]],
        monkeypatch: pytest.MonkeyPatch,
        config: EvictionConfig = CONFIG,
    ) -> None:
        self._make_model, self._make_inputs, self._config = make_model, make_inputs, config
        self.model = make_model()
        self.backend = tgvkv_backend(config.budget, ranking=config.ranking, lowering="eager")
        self.model.compile(backend=self.backend)
        self.lowered = 0
        self._asked = 0
        lower = programs.lower_rewritten

        def counted(*args: Any, **options: Any) -> Any:
            self.lowered += 1
            return lower(*args, **options)

        monkeypatch.setattr(programs, "lower_rewritten", counted)

    def generate(self, *requests: Any, steps: int = STEPS) -> None:
        """Each through `generate`."""
        for prompts in requests:
            inputs, wanted = self._question(prompts, steps)
            assert_same_run(traced_generate(self.model, inputs, steps), wanted)

    def call(self, *requests: Any, steps: int = STEPS, give_mask: bool = False) -> None:
        """Each by direct calls, as far as `steps`; positions are left to the model."""
        for prompts in requests:
            inputs, wanted = self._question(prompts, steps)
            assert_same_run(run(self.model, inputs, steps, give_mask=give_mask, give_positions=False), wanted)

    def graphs(self) -> dict[str, int]:
        """What dynamo handed over; what is compressed of it was lowered, and once."""
        graphs = dict(self.backend.graphs)
        assert self.lowered == graphs["prefill"] + graphs["decode"]
        return graphs

    def _question(self, prompts: Any, steps: int) -> tuple[dict[str, Tensor], ReferenceTrace]:
        self._asked += 1
        for seed in range(self._asked, self._asked + 100 * TRIES, 100):
            inputs = self._make_inputs(self.model, prompts, seed)
            wanted = Session(self._make_model(), self._config, image_token=(IMAGE, VIDEO)).generate(inputs, steps)
            if wanted.fragile == [None] * len(prompts):  # else float noise decides what is kept: other pictures
                if bool((inputs["input_ids"][0] == IMAGE).any()):
                    assert min(wanted.lengths[0][0]) < int(inputs["attention_mask"][0].sum()), "nothing is evicted"
                return inputs, wanted
        raise AssertionError(f"no pictures were found for {prompts} whose evictions float noise could not change")


def added(*counts: dict[str, int]) -> dict[str, int]:
    """Of each kind, all of them."""
    return {kind: sum(count[kind] for count in counts) for kind in counts[0]}
