"""transformers' attention implementations beside sdpa: the same positions, tokens and logits."""

from typing import Any

import pytest
import torch

from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import kept_of
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig

SHAPE = Shape(layers=2, seed=7)
PROMPTS = ((5, 9), (3, 12), (7,))
STEPS = 4


def model_with(attention: str, **options: Any) -> tuple[Any, Any]:
    """A compiled model and its backend. Its vision tower stays with sdpa: it runs eagerly, and would be compiled for flex."""
    model, backend = make_model(SHAPE), tgvkv_backend(**options, lowering="eager")
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    model.compile(backend=backend)
    return model, backend


def generate(model: Any, inputs: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=STEPS + 1, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_flex_attention(budget: float) -> None:
    """A padded batch, one sample without a picture: one prefill graph, one decode graph, the reference's result."""
    inputs = make_inputs(PROMPTS)
    expected = reference(make_model(SHAPE), inputs, STEPS, config=EvictionConfig(budget), image_token=IMAGE)
    assert expected.fragile == [None] * len(PROMPTS), "choose another seed: float noise decides here"
    model, backend = model_with("flex_attention", budget=budget)
    for _ in range(2):  # the second time, what the first left behind in transformers would show
        output = generate(model, inputs)
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected.continuation)
        for logits, wanted in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
        assert kept_of(output.past_key_values) == expected.kept[-1]
    assert backend.graphs == {"prefill": 1, "decode": 1}
    if budget == 1.0:
        stock = generate(make_model(SHAPE), inputs)
        assert torch.equal(output.sequences, stock.sequences)
