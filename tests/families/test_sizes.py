"""Every family in one process: pictures of several sizes and counts, videos, batches, texts; each graph compiled once.

All that a family can do at a budget of 0.3 is held against the oracle here, because compiling is what takes time. What is
recorded in `docs/models.json` is what these tests hold it to; `docs/models.md` is made from it.
"""

import dataclasses

import pytest

from tests.families.family import Family, Prompt, make_inputs, make_model
from tests.families.media import OTHER_SIZES
from tests.families.process import CONFIG, Process, added
from tests.families.table import FAMILIES
from tests.families.test_families import RECORD, fails_alone, skip_what_fails_alone
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
QUICK = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "chameleon", "idefics3")
"""One of each way that families differ here: one size of picture, tiles, grids and videos, sliding windows, a decoder that
merges vision itself, and samples padded with pictures."""


def process_of(family: Family, monkeypatch: pytest.MonkeyPatch, config: EvictionConfig = CONFIG) -> Process:
    return Process(
        lambda: make_model(family),
        lambda model, prompts, seed: make_inputs(family, model, prompts, seed=seed, others=OTHER_SIZES),
        monkeypatch,
        config,
    )


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_one_graph_for_every_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_what_fails_alone(name)
    record, process = RECORD[name], process_of(FAMILIES[name], monkeypatch)
    graphs, direct = record["graphs"], record["direct"]
    assert record["batch"] and record["images"] == 2  # what is asked below
    videos, video_batches = (VIDEOS, [VIDEO_BATCH]) if record["video"] and fails_alone(name, "video") is None else ((), [])
    process.generate(*SINGLE, *videos)
    assert of_generate(process.model, process.graphs()) == graphs
    process.generate(*TEXTS)
    assert process.graphs() == {**graphs, "dense": sum(graphs.values())}
    process.generate(*BATCHES, *video_batches)
    process.generate(SINGLE[3])
    assert of_decoder(process.graphs()) == added(graphs, graphs)
    # Where positions are left to the model, they are no input of the decoder, or one of another shape.
    process.call(SINGLE[0], SINGLE[2], *videos[1:])
    process.call(SINGLE[1], SINGLE[3], give_mask=True)
    assert of_decoder(process.graphs()) == added(graphs, graphs, direct)
    process.call(BATCHES[0], BATCHES[1], steps=0, give_mask=True)  # positions of a padded step must be given
    process.call(BATCHES[2])
    assert of_decoder(process.graphs()) == added(graphs, graphs, direct, direct)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_other_rankings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's rows and the order of tokens are the same whatever ranks."""
    skip_what_fails_alone(name)
    process = process_of(FAMILIES[name], monkeypatch, EvictionConfig(0.3, ranking="h2o"))
    process.generate(BATCHES[0], steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "exaone4_5"])
def test_windows_that_fill_up_and_full_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are made before the decoder (gemma3) and in it."""
    config = FAMILIES[name].config()
    config.text_config.sliding_window = 24
    process = process_of(dataclasses.replace(FAMILIES[name], config=lambda: config), monkeypatch)
    process.generate(((1, "image", 2),), ((9, "image", 9, "image", 16),))
    process.generate(((2, ("image", 1), 1),), steps=20)
    process.generate(((30, "image", 5),), ((4, "image", 3),))
    assert process.graphs() == {"prefill": 1, "decode": 2}
    process.generate(((1, "image", 1), (2,)), ((30, ("image", 2), 5), (4, "image", 9)))
    process.generate(((2, "image", 1), (3, "image", 1)), steps=20)
    process.generate(((3, "image", 1), (2, "image", 1)), steps=20)
    assert process.graphs() == {"prefill": 2, "decode": 4}
