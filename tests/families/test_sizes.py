"""A family in one process: pictures of several sizes and counts, videos, batches, no picture; each graph compiled once."""

from typing import Any

import pytest
import torch

from tests.families.family import IMAGE, VIDEO, Prompt, make_inputs, make_model
from tests.families.media import OTHER_SIZES
from tests.families.table import FAMILIES
from tests.families.test_families import RECORD, skip_what_fails_alone
from tests.support.comparing import assert_same_run
from tests.support.reference import Session
from tests.support.running import traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.config import EvictionConfig

CONFIG = EvictionConfig(0.3)
STEPS = 3
SINGLE: tuple[tuple[Prompt, ...], ...] = (
    ((5, "image", 9),),
    ((3, ("image", 1), 2, ("image", 2), 6),),
    ((8, ("image", 3), 12),),
    ((2, "image", 1, ("image", 1), 3, ("image", 2), 7),),
    ((6, ("image", 2), 4),),
)
VIDEOS: tuple[tuple[Prompt, ...], ...] = (((4, "video", 8),), ((3, ("video", 1), 9),), ((6, ("video", 2), 7),))
BATCHES: tuple[tuple[Prompt, ...], ...] = (
    ((5, "image", 7), (3, ("image", 1), 2, ("image", 2), 6)),
    ((5, ("image", 3), 7), (9,), (2, "image", 11)),
    ((4, ("image", 2), 9),) * 4,
)
NAMES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "chameleon")
"""One of each way that families differ here: one size of picture, tiles, grids and videos, deepstack, sliding windows, and a
decoder that merges vision itself."""


def ask(name: str, model: Any, prompts: tuple[Prompt, ...], seed: int) -> None:
    """A request through `generate`, held against the oracle."""
    family = FAMILIES[name]
    for attempt in range(seed, seed + 500, 100):
        inputs = make_inputs(family, model, prompts, seed=attempt, others=OTHER_SIZES)
        wanted = Session(make_model(family), CONFIG, image_token=(IMAGE, VIDEO)).generate(inputs, STEPS)
        if wanted.fragile == [None] * len(prompts):  # else float noise decides what is kept: other pictures
            break
    assert_same_run(traced_generate(model, inputs, STEPS), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_prefill_and_one_decode_graph_for_all_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_what_fails_alone(name)
    lowered: list[str] = []
    lower = programs.lower_rewritten

    def counted(*args: Any, **options: Any) -> Any:
        lowered.append(name)
        return lower(*args, **options)

    monkeypatch.setattr(programs, "lower_rewritten", counted)
    torch._dynamo.reset()
    model, backend = make_model(FAMILIES[name]), tgvkv_backend(CONFIG.budget, lowering="eager")
    model.compile(backend=backend)
    # Sliding windows that are full are another graph: where decoding takes two, it keeps them.
    steps = RECORD[name]["graphs"]["decode"]
    for number, prompts in enumerate([*SINGLE, *(VIDEOS if RECORD[name]["video"] else ())]):
        ask(name, model, prompts, number)
    assert backend.graphs == {"prefill": 1, "decode": steps}
    for number, prompts in enumerate(BATCHES):
        ask(name, model, prompts, 20 + number)
    ask(name, model, SINGLE[3], 30)
    assert backend.graphs["prefill"] == 2 and backend.graphs["decode"] <= 2 * steps
    assert len(lowered) == backend.graphs["prefill"] + backend.graphs["decode"]
