"""The merge and the decoder of further families, through stock `generate`, against the oracle."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.families.process import Process, added
from tests.families.shrunk import FAMILIES, GRIDS, REFUSED, known, make_inputs, make_model
from tests.support.counting import of_decoder
from tests.support.running import traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import UnsupportedGraphError

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "models.json").read_text(encoding="utf-8"))
BUDGET = 0.3
QUICK = ("cosmos3_omni", "gemma4")
"""Deepstack, and sliding windows."""


def model_and_inputs(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Skips what the installed transformers does not have, or does not encode before the prefill."""
    if not known(name):
        pytest.skip(f"the installed transformers has no {name}")
    if "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
        pytest.skip("features can be handed over since transformers 5.23")
    model = make_model(name, {**FAMILIES, **REFUSED}[name])
    return model, make_inputs(model)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_one_graph_for_every_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_and_inputs(name)
    sizes = 1 if FAMILIES[name].features == "tensor" else len(GRIDS)  # one tensor of features: all pictures are alike
    process = Process(
        lambda: make_model(name, FAMILIES[name]),
        lambda model, prompts, seed: make_inputs(model, prompts, first=seed % len(GRIDS), sizes=sizes, seed=seed),
        monkeypatch,
    )
    graphs = RECORD["decoders"][name]
    process.generate(((5, 9),), ((3, 2, 6),), ((70, 62),), ((2, 1, 3, 7),), ((6, 4),))
    assert process.graphs() == graphs
    process.generate(((12,),), ((17,),))
    assert process.graphs() == {**graphs, "dense": sum(graphs.values())}
    process.generate(((5, 7), (3, 2, 6)), ((5, 7), (9,), (2, 11)), ((4, 9),) * 4)
    process.generate(((3, 2, 6),))
    assert of_decoder(process.graphs()) == added(graphs, graphs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_budget_is_the_uncompiled_model(name: str) -> None:
    model, inputs = model_and_inputs(name)
    wanted = traced_generate(model, inputs, 3, lambda *_: [])
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    found = traced_generate(model, inputs, 3)
    assert torch.equal(found.continuation, wanted.continuation)
    for logits, dense in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
    for length, layers in zip((inputs["attention_mask"].sum(1) + 3).tolist(), found.kept[-1], strict=True):
        assert all(layer == list(range(length)) for layer in layers)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    model, inputs = model_and_inputs(name)
    model.compile(backend=tgvkv_backend(BUDGET, lowering="eager"))
    with pytest.raises(UnsupportedGraphError, match=r"sites cannot be rewritten|dynamo split the decoder"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    with pytest.raises(UnsupportedGraphError):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_every_family_is_recorded() -> None:
    assert set(RECORD["decoders"]) == set(FAMILIES)
