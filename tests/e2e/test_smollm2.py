"""Real weights: the LLaVA made of SmolLM2 runs under the backend, and says what the uncompiled model says."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.quantised import chosen, measure, simulations
from tests.support import smollm2
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.runtime.inspect import inspect_cache

pytestmark = pytest.mark.skipif(smollm2.missing() is not None, reason=str(smollm2.missing()))
FORCED = 3


def short(forced: int = FORCED) -> smollm2.Passage:
    chosen = smollm2.passage("execmodel", 512)
    return chosen._replace(forced=chosen.forced[:forced])


@functools.cache
def full() -> Tensor:
    """The uncompiled model's distributions."""
    return smollm2.say(smollm2.make_model(), short(), at_once=True)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_budget_says_what_the_uncompiled_model_says(lowering: str) -> None:
    expected, model = full(), smollm2.make_model()
    model.compile(backend=tgvkv_backend(budget=1.0, lowering=lowering))
    try:
        found = smollm2.say(model, short())
    finally:
        model._compiled_call_impl = None
    assert float(smollm2.divergence(expected, found).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_small_budget_holds_less_and_moves_what_is_said() -> None:
    expected, model = full(), smollm2.make_model()
    inputs = smollm2.inputs_of(model, short())
    model.compile(backend=tgvkv_backend(budget=0.2, lowering="eager"))
    try:
        found = smollm2.say(model, short())
        result = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    finally:
        model._compiled_call_impl = None
    report = inspect_cache(result)
    assert report.num_layers == 30
    assert report.physical_bytes < 0.5 * report.logical_bytes
    assert 0.01 < float(smollm2.divergence(expected, found).mean()) < 5


def test_the_text_it_sees_is_of_use() -> None:
    """The stand-in for the vision tower hands the text over: another text in its place makes what follows less likely."""
    model, chosen = smollm2.make_model(), smollm2.passage("execmodel", 512)
    other = chosen._replace(picture=smollm2.passage("formatstrings", 512).picture)
    likely = [
        float(smollm2.say(model, seen, at_once=True)[:-1].gather(1, chosen.forced[1:, None]).mean()) for seen in (chosen, other)
    ]
    assert likely[0] > likely[1] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.002), ("int4", 0.03)])
def test_what_a_compiled_cache_of_codes_loses(kv_dtype: Any, most: float) -> None:
    """All tokens stay; every step reads what those before it have written."""
    text = smollm2.passage("execmodel", 1024)
    expected, model = smollm2.say(smollm2.make_model(), text, at_once=True), smollm2.make_model()
    model.compile(backend=tgvkv_backend(budget=1.0, kv_dtype=kv_dtype, lowering="eager"))
    try:
        found = smollm2.say(model, text)
    finally:
        model._compiled_call_impl = None
    assert 1e-6 < float(smollm2.divergence(expected, found).mean()) <= most


@pytest.mark.slow
@torch.no_grad()
def test_what_codes_lose_of_real_keys_and_values() -> None:
    """Simulated, all tokens staying; the text is the one that loses most of those in `docs/quantised-cache.md`."""
    bounds = {"int8, rotated": 0.002, "int4, rotated, newest 16 in int8": 0.03}
    model = smollm2.make_model()
    rows: dict[str, Any] = {}
    try:
        for text, simulation in simulations("smollm2", ["compound"]):
            measure(rows, text, simulation, chosen(list(bounds)))
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    for name, most in bounds.items():
        assert 0 < rows[name]["texts"]["compound"]["kl"] <= most, name
