"""Models with quantised weights: tensors made of other tensors, which say themselves what `linear` does with them."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.comparing import TOLERANCE, assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference, reference_turn
from tests.support.running import Trace, run, second_turn
from tests.support.sharing import Sharing
from tests.support.wrapped import ScaledWeight, scale_weights
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ForeignCacheError, UnsupportedGraphError

SHAPE = Shape(layers=3, heads=4, kv_heads=2, seed=7)
PROMPTS = ((5, 9), (3, 2, 6))
QUESTION = torch.tensor([[30, 41, 52, 63, 7], [9, 12, 33, 18, 40]])
STEPS = 4


def _torchao() -> Any:
    pytest.importorskip("torchao", minversion="0.18", reason="torchao >= 0.18 is not installed", exc_type=ImportError)
    return pytest.importorskip("torchao.quantization", reason="this torchao is not made for this torch", exc_type=ImportError)


def int8(model: Any) -> None:
    torchao = _torchao()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def int8_in_groups(model: Any) -> None:
    torchao = _torchao()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(16)))


def int4(model: Any) -> None:
    """What torchao has of int4 for CPUs: `Int4WeightOnlyConfig` packs for GPUs only."""
    torchao = _torchao()
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)))


Quantise = Callable[[Any], None]


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: they share what dynamo traced."""
    torch.manual_seed(0)


def quantised(quantise: Quantise, seed: int = SHAPE.seed) -> Any:
    model = make_model(Shape(layers=3, heads=4, kv_heads=2, seed=seed))
    quantise(model)
    return model


@functools.cache
def sharing(quantise: Quantise) -> Sharing:
    """A model whose graphs are traced once for all budgets and lowerings."""
    return Sharing(quantised(quantise), tgvkv_backend(0.3, lowering="eager"))


def asked(quantise: Quantise, budget: float, lowering: Any) -> Any:
    """That model, compiled this way until it is asked for another."""
    shared = sharing(quantise)
    shared.asked = tgvkv_backend(budget, lowering=lowering)
    return shared.model


@functools.cache
def expected_of(quantise: Quantise, budget: float) -> Any:
    """What the reference does with a prompt and with a later turn."""
    model, config = quantised(quantise), EvictionConfig(budget)
    first = reference(model, make_inputs(PROMPTS), STEPS, config=config, image_token=IMAGE)
    turn = reference_turn(first, QUESTION, STEPS)
    assert first.fragile == turn.fragile == [None] * len(PROMPTS), "choose another seed: float noise decides here"
    return first, turn


WAYS = [
    *((quantise, "eager") for quantise in (scale_weights, int8, int8_in_groups, int4)),
    *((quantise, "aot_eager") for quantise in (scale_weights, int8, int4)),
    *(pytest.param(quantise, "inductor", marks=pytest.mark.slow) for quantise in (scale_weights, int8, int4)),
]


@pytest.mark.parametrize(("quantise", "lowering"), WAYS)
def test_prompt_steps_and_a_later_turn(quantise: Quantise, lowering: Any) -> None:
    expected, expected_turn = expected_of(quantise, 0.3)
    model = asked(quantise, 0.3, lowering)
    found = run(model, make_inputs(PROMPTS), STEPS)
    assert_same_run(found, expected)
    assert_same_run(second_turn(model, found.cache, found.mask, QUESTION, STEPS), expected_turn)


@pytest.mark.parametrize(("quantise", "lowering"), WAYS)
@torch.no_grad()
def test_the_whole_budget_is_the_uncompiled_quantised_model(quantise: Quantise, lowering: Any) -> None:
    expected = quantised(quantise).generate(**make_inputs(PROMPTS), **GENERATE)
    found = asked(quantise, 1.0, lowering).generate(**make_inputs(PROMPTS), **GENERATE)
    assert torch.equal(found.sequences, expected.sequences)
    for logits, wanted in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=TOLERANCE)


GENERATE: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def test_weights_matter() -> None:
    """What the tests above would not notice: that nothing was quantised."""
    assert isinstance(quantised(scale_weights).lm_head.weight, ScaledWeight)
    plain: Trace = run_uncompiled(make_model(SHAPE))
    other = run_uncompiled(quantised(scale_weights))
    assert float((plain.logits[0] - other.logits[0]).abs().max()) > 10 * TOLERANCE


def run_uncompiled(model: Any) -> Trace:
    """A prompt's logits at the whole budget."""
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    return run(model, make_inputs(PROMPTS), 0)


@pytest.mark.parametrize("quantise", [scale_weights, int8])
def test_a_cache_of_another_quantised_model(quantise: Quantise) -> None:
    """Such a weight has no address of its own; two models must not look alike for it."""
    backend = tgvkv_backend(0.3, lowering="eager")
    models = [quantised(quantise, seed) for seed in (1, 2)]
    for model in models:
        model.compile(backend=backend)
    trace, _ = (run(model, make_inputs(PROMPTS), 1) for model in models)
    going_on = second_turn(models[0], trace.cache, trace.mask, QUESTION, 0)
    with pytest.raises(ForeignCacheError, match="made by another model"):
        second_turn(models[1], going_on.cache, going_on.mask, QUESTION, 0)


def everything(name: str) -> bool:
    return "language_model" in name


def without_attention(name: str) -> bool:
    return "mlp" in name


def output_layer(name: str) -> bool:
    return "lm_head" in name


def packed(chosen: Callable[[str], bool], dtype: torch.dtype = torch.qint8) -> Any:
    """A model whose linear layers of these names torch itself has quantised."""
    model = make_model(SHAPE)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and chosen(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return torch.ao.quantization.quantize_dynamic(model, names, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("chosen", [everything, without_attention])
def test_packed_layers_are_refused_for_what_they_are(chosen: Callable[[str], bool], dtype: torch.dtype) -> None:
    model = packed(chosen, dtype)
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    with pytest.raises(UnsupportedGraphError) as caught:
        model.generate(**make_inputs(PROMPTS), **GENERATE)
    text = str(caught.value)
    assert "cannot trace the model's packed quantised layers (torch.ao.quantization, at " in text
    assert "torchao.quantization.quantize_(model, Int8WeightOnlyConfig())" in text
    assert "inputs_embeds" not in text and "configure_dynamo" not in text


def test_packed_layers_run_behind_the_decoder() -> None:
    expected = packed(output_layer).generate(**make_inputs(PROMPTS), **GENERATE)
    model = packed(output_layer)
    model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
    assert torch.equal(model.generate(**make_inputs(PROMPTS), **GENERATE).sequences, expected.sequences)
