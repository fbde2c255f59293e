"""The merge and the decoder of further families, through stock `generate`, against the oracle."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.families.family import IMAGE, VIDEO
from tests.families.shrunk import FAMILIES, REFUSED, known, make_inputs, make_model
from tests.support.comparing import assert_same_run
from tests.support.reference import Session
from tests.support.running import traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import UnsupportedGraphError

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "models.json").read_text(encoding="utf-8"))
BUDGET = 0.3
STEPS = 6


def model_and_inputs(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Skips what the installed transformers does not have, or does not encode before the prefill."""
    if not known(name):
        pytest.skip(f"the installed transformers has no {name}")
    if "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
        pytest.skip("features can be handed over since transformers 5.23")
    model = make_model(name, {**FAMILIES, **REFUSED}[name])
    return model, make_inputs(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_in_generate(name: str) -> None:
    model, inputs = model_and_inputs(name)
    expected = Session(model, EvictionConfig(BUDGET), image_token=(IMAGE, VIDEO)).generate(inputs, STEPS)
    assert expected.fragile.count(None) >= 2, "choose another seed: float noise decides here"
    assert max(expected.lengths[0][0]) < int(inputs["attention_mask"][0].sum())
    backend = tgvkv_backend(BUDGET, lowering="eager")
    model.compile(backend=backend)
    assert_same_run(traced_generate(model, inputs, STEPS), expected)
    assert backend.graphs == RECORD["decoders"][name]


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
