"""Every family in one process: pictures of several sizes and counts, videos, batches, texts; each graph compiled once.

All that a family can do at a budget of 0.3 is held against the oracle here, because compiling is what takes time. What is
recorded in `docs/models.json` is what these tests hold it to; `docs/models.md` is made from it.
"""

import dataclasses
from typing import Any

import pytest
import torch

from tests.families.family import IMAGE, VIDEO, Family, Prompt, make_inputs, make_model
from tests.families.media import OTHER_SIZES
from tests.families.table import FAMILIES
from tests.families.test_families import RECORD, skip_what_fails_alone
from tests.support.comparing import assert_same_run
from tests.support.counting import of_decoder
from tests.support.reference import ReferenceTrace, Session
from tests.support.running import run, traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.config import EvictionConfig

CONFIG = EvictionConfig(0.3)
STEPS = 3
Batch = tuple[Prompt, ...]
SINGLE: tuple[Batch, ...] = (
    ((5, "image", 9),),
    ((3, ("image", 1), 2, ("image", 2), 6),),
    ((70, ("image", 3), 62),),
    ((2, "image", 1, ("image", 1), 3, ("image", 2), 7),),
    ((6, ("image", 2), 4),),
)
VIDEOS: tuple[Batch, ...] = (((4, "video", 8),), ((3, ("video", 1), 9),), ((6, ("video", 2), 7),))
TEXTS: tuple[Batch, ...] = (((12,),), ((17,),))
BATCHES: tuple[Batch, ...] = (
    ((5, "image", 7), (3, ("image", 1), 2, ("image", 2), 6)),
    ((5, ("image", 3), 7), (9,), (2, "image", 11)),
    ((4, ("image", 2), 9),) * 4,
)
VIDEO_BATCH: Batch = ((5, "video", 7), (3, "video", 2, "video", 6), (9,))
QUICK = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "chameleon", "idefics3")
"""One of each way that families differ here: one size of picture, tiles, grids and videos, sliding windows, a decoder that
merges vision itself, and samples padded with pictures."""


class Process:
    """A model that is compiled once, and asked one thing after the other.

    Attributes:
        lowered: How many graphs were lowered.
    """

    def __init__(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self.family = family
        self.model: Any = make_model(family)
        self.backend = tgvkv_backend(CONFIG.budget, lowering="eager")
        self.model.compile(backend=self.backend)
        self.lowered = 0
        self._seed = 0
        lower = programs.lower_rewritten

        def counted(*args: Any, **options: Any) -> Any:
            self.lowered += 1
            return lower(*args, **options)

        monkeypatch.setattr(programs, "lower_rewritten", counted)

    def generate(self, *requests: Batch, steps: int = STEPS) -> None:
        """Each through `generate`, held against the oracle."""
        for prompts in requests:
            inputs, wanted = self._question(prompts, steps)
            assert_same_run(traced_generate(self.model, inputs, steps), wanted)

    def call(self, *requests: Batch, steps: int = STEPS, give_mask: bool = False) -> None:
        """Each by direct calls, as far as `steps`; positions are left to the model."""
        for prompts in requests:
            inputs, wanted = self._question(prompts, steps)
            assert_same_run(run(self.model, inputs, steps, give_mask=give_mask, give_positions=False), wanted)

    def graphs(self) -> dict[str, int]:
        """What dynamo handed over; all of it was lowered, and once."""
        graphs = self.backend.graphs
        assert self.lowered == graphs["prefill"] + graphs["decode"]
        return dict(graphs)

    def _question(self, prompts: Batch, steps: int) -> tuple[dict[str, torch.Tensor], ReferenceTrace]:
        self._seed += 1
        for seed in range(self._seed, self._seed + 500, 100):
            inputs = make_inputs(self.family, self.model, prompts, seed=seed, others=OTHER_SIZES)
            wanted = Session(make_model(self.family), CONFIG, image_token=(IMAGE, VIDEO)).generate(inputs, steps)
            if wanted.fragile == [None] * len(prompts):  # else float noise decides what is kept: other pictures
                return inputs, wanted
        raise AssertionError(f"no pictures were found for {prompts} whose evictions float noise could not change")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_one_graph_for_every_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_what_fails_alone(name)
    record, process = RECORD[name], Process(FAMILIES[name], monkeypatch)
    graphs, videos = record["graphs"], VIDEOS if record["video"] else ()
    process.generate(*SINGLE, *videos)
    assert process.graphs() == graphs
    process.generate(*TEXTS)
    assert process.graphs() == {**graphs, "dense": sum(graphs.values())}
    process.generate(*BATCHES, *([VIDEO_BATCH] if record["video"] else []))
    process.generate(SINGLE[3])
    assert of_decoder(process.graphs()) == times(2, graphs)
    # Where positions are left to the model, they are no input of the decoder, or one of another shape.
    process.call(SINGLE[0], SINGLE[2], *videos[1:])
    process.call(SINGLE[1], SINGLE[3], give_mask=True)
    assert of_decoder(process.graphs()) == times(3, graphs)
    process.call(BATCHES[0], BATCHES[1], steps=0, give_mask=True)  # positions of a padded step must be given
    process.call(BATCHES[2])
    assert of_decoder(process.graphs()) == times(4, graphs)


def times(factor: int, graphs: dict[str, int]) -> dict[str, int]:
    return {kind: factor * count for kind, count in graphs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "exaone4_5"])
def test_windows_that_fill_up_and_full_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are made before the decoder (gemma3) and in it."""
    config = FAMILIES[name].config()
    config.text_config.sliding_window = 24
    process = Process(dataclasses.replace(FAMILIES[name], config=lambda: config), monkeypatch)
    process.generate(((1, "image", 2),), ((9, "image", 9, "image", 16),))
    process.generate(((2, ("image", 1), 1),), steps=20)
    process.generate(((30, "image", 5),), ((4, "image", 3),))
    assert process.graphs() == {"prefill": 1, "decode": 2}
    process.generate(((1, "image", 1), (2,)), ((30, ("image", 2), 5), (4, "image", 9)))
    process.generate(((2, "image", 1), (3, "image", 1)), steps=20)
    process.generate(((3, "image", 1), (2, "image", 1)), steps=20)
    assert process.graphs() == {"prefill": 2, "decode": 4}
