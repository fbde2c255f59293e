"""transformers' attention implementations beside sdpa: the same positions, tokens and logits."""

from typing import Any

import pytest
import torch

from tests.support.counting import of_generate
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import kept_of
from tests.support.talking import Conversation
from tgvkv_compile import explain, tgvkv_backend
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
    assert of_generate(model, backend.graphs) == {"prefill": 1, "decode": 1}
    if budget == 1.0:
        stock = generate(make_model(SHAPE), inputs)
        assert torch.equal(output.sequences, stock.sequences)


def test_flex_attention_in_later_turns() -> None:
    """Text and a picture on the compressed cache, padded both times; then text, and a first picture after text alone."""
    config = EvictionConfig(0.3)
    for first in (PROMPTS, ((9,), (6,), (8,))):
        model, backend = model_with("flex_attention", budget=0.3)
        talk = Conversation(model, make_model(SHAPE), config)
        talk.say(make_inputs(first)).steps(2)
        talk.say(make_inputs(((4,), (6,), (5,)), seed=3)).steps(2)
        talk.say(make_inputs(((4, 6), (7,), (2, 3, 5)), seed=5)).steps(3)
        assert talk.session.fragile == [None] * len(PROMPTS), "choose another seed: float noise decides here"
        assert talk.compared == 10 * len(PROMPTS)
        assert backend.graphs.get("vision_continuation", 0) + backend.graphs.get("late_prefill", 0) >= 1


def test_explain_sees_what_the_backend_does_with_flex_attention() -> None:
    model = make_model(SHAPE)
    model.set_attn_implementation({"text_config": "flex_attention", "vision_config": "sdpa"})
    report = explain(model, make_inputs(PROMPTS), 0.3)
    assert report.problems == () and report.capacity is not None and report.capacity.num_layers == SHAPE.layers
    assert [site.form for graph in report.graphs if graph.kind == "prefill" for site in graph.sites] == ["flex"] * SHAPE.layers
