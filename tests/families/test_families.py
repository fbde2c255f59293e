"""Every family through stock `generate`: equal to the oracle, and to the uncompiled model at the whole budget.

What is recorded in `docs/models.json` is what these tests hold it to; `docs/models.md` is made from it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.families.family import IMAGE, VIDEO, Family, Kind, Prompt, make_inputs, make_model
from tests.families.table import FAMILIES
from tests.support.comparing import assert_same_run
from tests.support.counting import of_decoder, of_generate
from tests.support.reference import ReferenceTrace, Session
from tests.support.running import run, traced_generate
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


def recorded(what: str) -> list[str]:
    """The families that have something under this name."""
    return [name for name, record in RECORD.items() if record[what]]


def skip_what_fails_alone(name: str, kind: Kind = "image") -> None:
    """Skips a family of `FAIL_ALONE` if the uncompiled model fails with these inputs, too."""
    if name == "aria" and torch.__version__ < "2.12" and transformers.__version__ < "5.18":
        pytest.skip("torch 2.11 cannot trace how aria of transformers 5.17 slices by expert: refused, as a split decoder")
    if name not in FAIL_ALONE[kind]:
        return
    family = FAMILIES[name]
    model = make_model(family)
    try:
        model.generate(**make_inputs(family, model, mixed(kind)), max_new_tokens=1, do_sample=False)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} of transformers {transformers.__version__} fails uncompiled: {error}")


def compiled(family: Family, budget: float) -> tuple[Any, Any]:
    """A model compiled in place, and its backend."""
    model, backend = make_model(family), tgvkv_backend(budget, lowering="eager")
    model.compile(backend=backend)
    return model, backend


def single(kind: Kind) -> tuple[Prompt, ...]:
    return ((5, kind, 9),)


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


@pytest.mark.parametrize("name", recorded("graphs"))
def test_the_whole_budget_is_the_uncompiled_model(name: str) -> None:
    skip_what_fails_alone(name)
    family = FAMILIES[name]
    model, _ = compiled(family, 1.0)
    inputs = make_inputs(family, model, mixed("image"))
    found = traced_generate(model, inputs, STEPS)
    wanted = traced_generate(make_model(family), inputs, STEPS, lambda *_: [])
    assert torch.equal(found.continuation, wanted.continuation)
    for logits, dense in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
    for length, layers in zip((inputs["attention_mask"].sum(1) + STEPS).tolist(), found.kept[-1], strict=True):
        assert all(layer == list(range(length)) for layer in layers)


@pytest.mark.parametrize("name", recorded("graphs"))
def test_a_padded_batch_in_generate(name: str) -> None:
    skip_what_fails_alone(name)
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, mixed("image"))
    assert_same_run(traced_generate(model, inputs, STEPS), expected_of(family, inputs))
    assert of_generate(model, backend.graphs) == RECORD[name]["graphs"]
    assert RECORD[name]["batch"] and RECORD[name]["images"] == 2  # what `mixed` has


@pytest.mark.parametrize("name", recorded("direct"))
def test_one_prompt_by_direct_calls(name: str) -> None:
    """Without mask and positions: attention is causal as such, and the model finds positions and features by itself."""
    skip_what_fails_alone(name)
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, single("image"))
    assert_same_run(run(model, inputs, STEPS, give_mask=False, give_positions=False), expected_of(family, inputs))
    assert of_decoder(backend.graphs) == RECORD[name]["direct"]


@pytest.mark.parametrize("name", recorded("direct"))
def test_a_padded_batch_in_a_direct_call(name: str) -> None:
    """The prefill only: where positions have three rows, a step of a padded batch needs positions from the caller."""
    skip_what_fails_alone(name)
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, mixed("image"))
    expected = expected_of(family, inputs)
    expected.logits, expected.kept, expected.tokens = expected.logits[:1], expected.kept[:1], expected.tokens[:1]
    assert_same_run(run(model, inputs, 0, give_positions=False), expected)
    assert of_decoder(backend.graphs) == {"prefill": RECORD[name]["direct"]["prefill"]}


@pytest.mark.parametrize("name", recorded("video"))
def test_videos_by_direct_calls(name: str) -> None:
    skip_what_fails_alone(name, "video")
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, single("video"))
    assert_same_run(run(model, inputs, STEPS, give_mask=False, give_positions=False), expected_of(family, inputs))
    assert of_decoder(backend.graphs) == RECORD[name]["direct"]


@pytest.mark.parametrize("name", recorded("video"))
def test_videos(name: str) -> None:
    skip_what_fails_alone(name, "video")
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, mixed("video"))
    assert_same_run(traced_generate(model, inputs, STEPS), expected_of(family, inputs))
    assert of_generate(model, backend.graphs) == RECORD[name]["graphs"]


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_an_image_and_a_video_in_one_prompt(name: str) -> None:
    """Two merges in one graph: vision is what either of them fills."""
    skip_what_fails_alone(name, "video")
    family = FAMILIES[name]
    model, backend = compiled(family, BUDGET)
    inputs = make_inputs(family, model, ((4, "video", 3, "image", 8),))
    assert_same_run(traced_generate(model, inputs, STEPS), expected_of(family, inputs))
    assert of_generate(model, backend.graphs) == RECORD[name]["graphs"]
