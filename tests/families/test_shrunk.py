"""The merge and the decoder of further families, through stock `generate`, against the oracle."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.families.process import WHOLE, Process, added, batches_first
from tests.families.shrunk import FAMILIES, GRIDS, REFUSED, known, make_inputs, make_model
from tests.support.counting import of_decoder
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import UnsupportedGraphError

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "models.json").read_text(encoding="utf-8"))
BUDGET = 0.3
BATCHES = (((5, 7), (3, 2, 6)), ((5, 7), (9,), (2, 11)), ((4, 9),) * 4)
QUICK = ("cosmos3_omni", "gemma4")
"""Deepstack, and sliding windows."""


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: the tests of a family share a process."""
    torch.manual_seed(0)


def skip_unknown(name: str) -> None:
    """Skips what the installed transformers does not have, or does not encode before the prefill."""
    if not known(name):
        pytest.skip(f"the installed transformers has no {name}")
    if "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
        pytest.skip("features can be handed over since transformers 5.23")


@pytest.fixture(scope="module")
def process(request: pytest.FixtureRequest) -> Iterator[tuple[str, Process]]:
    """A family, and its process, in which each of the tests finds what the others compiled."""
    name = request.param
    skip_unknown(name)
    sizes = 1 if FAMILIES[name].features == "tensor" else len(GRIDS)  # one tensor of features: all pictures are alike
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        yield (
            name,
            Process(
                lambda: make_model(name, FAMILIES[name]),
                lambda model, prompts, seed: make_inputs(model, prompts, first=seed % len(GRIDS), sizes=sizes, seed=seed),
                patch,
                {WHOLE: EvictionConfig(1.0)},
            ),
        )


@pytest.mark.parametrize(
    "process", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES], indirect=True
)
def test_one_graph_for_every_prompt(process: tuple[str, Process]) -> None:
    name, asked = process
    graphs = RECORD["decoders"][name]
    asked.generate(((5, 9),), ((3, 2, 6),), ((70, 62),), ((2, 1, 3, 7),), ((6, 4),))
    assert asked.graphs() == graphs
    asked.generate(((12,),), ((17,),))
    assert asked.graphs() == {**graphs, "dense": sum(graphs.values())}
    asked.generate(*BATCHES, ((3, 2, 6),))
    assert of_decoder(asked.graphs()) == added(graphs, graphs)


@pytest.mark.parametrize("process", FAMILIES, indirect=True)
def test_batches(process: tuple[str, Process]) -> None:
    """At a budget of 0.3, and at the whole one, where the answers are the uncompiled model's."""
    name, asked = process
    expected = batches_first(name, RECORD["decoders"][name])
    if not asked.graphs():  # the test above asks the same process for batches, too
        asked.generate(*BATCHES)
        assert asked.graphs() == expected
    asked.generate_whole(make_inputs(asked.model), 3, options=WHOLE)
    assert all(0 < count <= expected[kind] for kind, count in of_decoder(asked.graphs(WHOLE)).items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    skip_unknown(name)
    torch._dynamo.reset()
    model = make_model(name, REFUSED[name])
    inputs = make_inputs(model)
    model.compile(backend=tgvkv_backend(BUDGET, lowering="eager"))
    with pytest.raises(UnsupportedGraphError, match=r"sites cannot be rewritten|dynamo split the decoder"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    with pytest.raises(UnsupportedGraphError):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_every_family_is_recorded() -> None:
    assert set(RECORD["decoders"]) == set(FAMILIES)
