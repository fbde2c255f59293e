"""Pictures and videos in one prompt, and what the tests of families share. What every family does: `test_sizes`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.families.family import IMAGE, VIDEO, Family, Kind, Prompt, make_inputs, make_model
from tests.families.table import FAMILIES
from tests.support.comparing import assert_same_run
from tests.support.counting import of_generate
from tests.support.reference import ReferenceTrace, Session
from tests.support.running import traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "models.json").read_text(encoding="utf-8"))[
    "families"
]
BUDGET = 0.3
STEPS = 7
FAIL_ALONE = {"image": ("llama4",), "video": ("llava_onevision",)}
"""Nothing else may be skipped: llama4 lacks an argument or attribute of its own on transformers 5.17 and 5.24, and with 5.17
the placeholders that these tests count for a video of llava_onevision are not those that the model wants."""


def fails_alone(name: str, kind: Kind = "image") -> str | None:
    """Why a family of `FAIL_ALONE` cannot be tried, if the uncompiled model fails with these inputs, too."""
    if name == "aria" and torch.__version__ < "2.12" and transformers.__version__ < "5.18":
        return "torch 2.11 cannot trace how aria of transformers 5.17 slices by expert: refused, as a split decoder"
    if name not in FAIL_ALONE[kind]:
        return None
    family = FAMILIES[name]
    model = make_model(family)
    try:
        model.generate(**make_inputs(family, model, mixed(kind)), max_new_tokens=1, do_sample=False)
    except (AttributeError, TypeError, ValueError) as error:
        return f"{name} of transformers {transformers.__version__} fails uncompiled: {error}"
    return None


def skip_what_fails_alone(name: str, kind: Kind = "image") -> None:
    """Skips what `fails_alone`."""
    reason = fails_alone(name, kind)
    if reason is not None:
        pytest.skip(reason)


def mixed(kind: Kind) -> tuple[Prompt, ...]:
    """Different lengths, a sample with two images or videos, one without."""
    return ((5, kind, 7), (3, kind, 2, kind, 6), (9,))


def expected_of(family: Family, inputs: Any) -> ReferenceTrace:
    session = Session(make_model(family), EvictionConfig(BUDGET), image_token=(IMAGE, VIDEO))
    trace = session.generate(inputs, STEPS)
    assert trace.fragile == [None] * len(inputs["input_ids"]), "choose another seed: float noise decides here"
    first = trace.lengths[0][0]
    assert max(first) < int(inputs["attention_mask"][0].sum()), "choose another seed: nothing is evicted"
    return trace


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_an_image_and_a_video_in_one_prompt(name: str) -> None:
    """Two merges in one graph: vision is what either of them fills."""
    skip_what_fails_alone(name, "video")
    family = FAMILIES[name]
    model, backend = make_model(family), tgvkv_backend(BUDGET, lowering="eager")
    model.compile(backend=backend)
    inputs = make_inputs(family, model, ((4, "video", 3, "image", 8),))
    assert_same_run(traced_generate(model, inputs, STEPS), expected_of(family, inputs))
    assert of_generate(model, backend.graphs) == RECORD[name]["graphs"]
