"""Every family in one process: pictures of several sizes and counts, videos, batches, texts; each graph compiled once.

All that a family can do is held against the oracle here, because compiling is what takes time. What is
recorded in `docs/models.json` is what these tests hold it to; `docs/models.md` is made from it.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.families.family import Family, Prompt, make_inputs, make_model
from tests.families.media import OTHER_SIZES
from tests.families.process import WHOLE, Process, added, batches_first
from tests.families.table import FAMILIES
from tests.families.test_families import RECORD, fails_alone, mixed, skip_what_fails_alone
from tests.support.counting import of_decoder, of_generate
from tgvkv_compile.config import EvictionConfig

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
QUICK = ("llava_next", "qwen2_5_vl", "gemma3")
"""Tiles, grids and videos, sliding windows; batches of every family are `test_batches`."""


OTHERS = {WHOLE: EvictionConfig(1.0), "h2o": EvictionConfig(0.3, ranking="h2o")}


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: the tests of a family share a process."""
    torch.manual_seed(0)


def process_of(family: Family, monkeypatch: pytest.MonkeyPatch, others: Mapping[str, EvictionConfig] = OTHERS) -> Process:
    torch._dynamo.reset()
    return Process(
        lambda: make_model(family),
        lambda model, prompts, seed: make_inputs(family, model, prompts, seed=seed, others=OTHER_SIZES),
        monkeypatch,
        others,
    )


@pytest.fixture(scope="module")
def process(request: pytest.FixtureRequest) -> Iterator[tuple[str, Process]]:
    """A family, and its process, in which each of the tests finds what the others compiled."""
    skip_what_fails_alone(request.param)
    with pytest.MonkeyPatch.context() as patch:
        yield request.param, process_of(FAMILIES[request.param], patch)


@pytest.mark.parametrize(
    "process", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES], indirect=True
)
def test_one_graph_for_every_prompt(process: tuple[str, Process]) -> None:
    name, asked = process
    record = RECORD[name]
    graphs, direct = record["graphs"], record["direct"]
    assert record["batch"] and record["images"] == 2  # what is asked below
    videos, video_batches = (VIDEOS, [VIDEO_BATCH]) if films(name) else ((), [])
    asked.generate(*SINGLE, *videos)
    assert of_generate(asked.model, asked.graphs()) == graphs
    asked.generate(*TEXTS)
    assert asked.graphs() == {**graphs, "dense": sum(graphs.values())}
    asked.generate(*BATCHES, *video_batches)
    asked.generate(SINGLE[3])
    assert of_decoder(asked.graphs()) == added(graphs, graphs)
    # Where positions are left to the model, they are no input of the decoder, or one of another shape.
    asked.call(SINGLE[0], SINGLE[2], *videos[1:])
    asked.call(SINGLE[1], SINGLE[3], give_mask=True)
    assert of_decoder(asked.graphs()) == added(graphs, graphs, direct)
    asked.call(BATCHES[0], BATCHES[1], steps=0, give_mask=True)  # positions of a padded step must be given
    asked.call(BATCHES[2])
    assert of_decoder(asked.graphs()) == added(graphs, graphs, direct, direct)


@pytest.mark.parametrize("process", FAMILIES, indirect=True)
def test_batches(process: tuple[str, Process]) -> None:
    """At a budget of 0.3, at the whole one, where the answers are the uncompiled model's, and with another ranking.

    Attention's rows and the order of tokens are the same whatever ranks.
    """
    name, asked = process
    expected = batches_first(name, RECORD[name]["graphs"])
    before = asked.graphs()  # none, unless the test above has asked this process for batches, too
    if not before:
        asked.generate(*BATCHES, *([VIDEO_BATCH] if films(name) else []))
        assert of_generate(asked.model, asked.graphs()) == expected
    asked.generate_whole(make_inputs(FAMILIES[name], asked.model, mixed("image")), 7, options=WHOLE)
    asked.generate(BATCHES[0], options="h2o")
    for options in OTHERS:
        assert all(0 < count <= expected[kind] for kind, count in of_decoder(asked.graphs(options)).items())


def films(name: str) -> bool:
    """Whether the family's videos can be tried."""
    return bool(RECORD[name]["video"]) and fails_alone(name, "video") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "exaone4_5"])
def test_windows_that_fill_up_and_full_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are made before the decoder (gemma3) and in it."""
    config = FAMILIES[name].config()
    config.text_config.sliding_window = 24
    process = process_of(dataclasses.replace(FAMILIES[name], config=lambda: config), monkeypatch, {})
    process.generate(((1, "image", 2),), ((9, "image", 9, "image", 16),))
    process.generate(((2, ("image", 1), 1),), steps=20)
    process.generate(((30, "image", 5),), ((4, "image", 3),))
    assert process.graphs() == {"prefill": 1, "decode": 2}
    process.generate(((1, "image", 1), (2,)), ((30, ("image", 2), 5), (4, "image", 9)))
    process.generate(((2, "image", 1), (3, "image", 1)), steps=20)
    process.generate(((3, "image", 1), (2, "image", 1)), steps=20)
    assert process.graphs() == {"prefill": 2, "decode": 4}
