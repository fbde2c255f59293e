"""The ways in which users call a compiled model, and what they do with its cache."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tgvkv_compile
from tests.support.comparing import assert_same_run, assert_same_traces
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import ReferenceTrace, reference, reference_turn
from tests.support.running import Trace, kept_of, run, second_turn
from tests.support.sharing import Sharing
from tgvkv_compile import inspect_cache, tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.runtime.logical import LogicalKV

BUDGET = 0.3
STEPS = 10
SHAPE = Shape(layers=3, heads=4, kv_heads=2, seed=7)
SINGLE = ((5, 9),)
PADDED = ((5, 9), (3, 2, 6), (4, 12))


@functools.cache
def expected_of(prompts: Any, config: EvictionConfig | None = None, steps: int = STEPS) -> ReferenceTrace:
    trace = reference(
        make_model(SHAPE), make_inputs(prompts), steps, config=config or EvictionConfig(BUDGET), image_token=IMAGE
    )
    assert trace.fragile == [None] * len(prompts), "choose another seed: float noise decides here"
    return trace


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: `compiled_model`s share what dynamo traced."""
    torch.manual_seed(0)


@pytest.fixture
def forgetful() -> None:
    """Forgets it after all."""
    torch._dynamo.reset()


@functools.cache
def sharing() -> Sharing:
    return Sharing(make_model(SHAPE), tgvkv_backend(BUDGET, lowering="eager"))


def compiled_model(budget: float = BUDGET, lowering: Any = "eager", **options: Any) -> tuple[Any, Any]:
    """A model, the same each time, compiled in place this way until the next call of this function; and its backend."""
    shared, backend = sharing(), tgvkv_backend(budget, lowering=lowering, **options)
    shared.asked = backend
    return shared.model, backend


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_prefill_cap_that_no_layer_meets_changes_nothing(lowering: Any) -> None:
    """Every layer wants the same here, so that the mean budget itself is cap enough."""
    model, _ = compiled_model(budgeting="uniform", prefill_cap=1.0, lowering=lowering)
    config = EvictionConfig(BUDGET, budgeting="uniform")
    assert_same_run(run(model, make_inputs(PADDED), STEPS), expected_of(PADDED, config))


def generate(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=steps + 1,
        do_sample=False,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


def check_generated(output: Any, inputs: dict[str, Tensor], expected: Trace) -> None:
    """Tokens, logits and what the cache holds at the end."""
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected.continuation)
    for logits, wanted in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert kept_of(output.past_key_values) == expected.kept[-1]


def _in_place(model: Any, options: dict[str, Any]) -> Any:
    model.compile(backend=tgvkv_backend(**options))
    return model


def _forward(model: Any, options: dict[str, Any]) -> Any:
    model.forward = torch.compile(model.forward, backend=tgvkv_backend(**options))
    return model


def _wrapped(model: Any, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend=tgvkv_backend(**options))


def _helper(model: Any, options: dict[str, Any]) -> Any:
    assert tgvkv_compile.compile(model, **options) is model
    return model


def _by_name(model: Any, options: dict[str, Any]) -> Any:
    return torch.compile(model, backend="tgvkv", options=options)


def _by_name_in_place(model: Any, options: dict[str, Any]) -> Any:
    model.compile(backend="tgvkv", options=options)
    return model


Way = Callable[[Any, dict[str, Any]], Any]
ALL_WAYS: list[Way] = [_in_place, _forward, _wrapped, _helper, _by_name, _by_name_in_place]
GENERATING_WAYS: list[Way] = [_in_place, _forward, _helper, _by_name_in_place]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("way", ALL_WAYS)
def test_called_in_a_loop(way: Way) -> None:
    expected = expected_of(SINGLE)
    model = way(make_model(SHAPE), {"budget": BUDGET, "lowering": "eager"})
    assert_same_run(run(model, make_inputs(SINGLE), STEPS), expected)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("way", GENERATING_WAYS)
def test_generate(way: Way) -> None:
    expected, inputs = expected_of(SINGLE), make_inputs(SINGLE)
    model = way(make_model(SHAPE), {"budget": BUDGET, "lowering": "eager"})
    check_generated(generate(model, inputs), inputs, expected)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("give_mask", [True, False])
def test_a_loop_without_position_ids(give_mask: bool) -> None:
    """The model takes positions from the cache, which has the true length."""
    model = _wrapped(make_model(SHAPE), {"budget": BUDGET, "lowering": "eager"})
    trace = run(model, make_inputs(SINGLE), STEPS, give_positions=False, give_mask=give_mask)
    assert_same_run(trace, expected_of(SINGLE))


def test_a_padded_batch() -> None:
    expected, inputs = expected_of(PADDED), make_inputs(PADDED)
    model, _ = compiled_model()
    assert_same_run(run(model, inputs, STEPS), expected)
    check_generated(generate(model, inputs), inputs, expected)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_budget_is_the_uncompiled_model(lowering: Any) -> None:
    stock = make_model(SHAPE)
    model, backend = compiled_model(budget=1.0, lowering=lowering)
    for prompts in (SINGLE, PADDED):
        inputs = make_inputs(prompts)
        wanted, found = generate(stock, inputs), generate(model, inputs)
        assert torch.equal(found.sequences, wanted.sequences)
        for logits, dense in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
        lengths = (inputs["attention_mask"].sum(1) + STEPS).tolist()
        everything = [[list(range(length))] * SHAPE.layers for length in lengths]
        assert kept_of(found.past_key_values) == everything
    assert backend.graphs["prefill"] >= 1 and backend.graphs["decode"] >= 1


@pytest.mark.parametrize("prompts", [((9,),), ((9,), (14,))], ids=["single", "padded"])
def test_text_only_prompts_run_dense(prompts: Any) -> None:
    inputs = make_inputs(prompts)
    model, backend = compiled_model(budget=0.1)
    wanted, found = generate(make_model(SHAPE), inputs), generate(model, inputs)
    assert torch.equal(found.sequences, wanted.sequences)
    for logits, dense in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)
    assert set(backend.graphs) == {"dense"}
    for layer, stock in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert type(layer.keys) is Tensor and type(layer.values) is Tensor
        torch.testing.assert_close(layer.keys, stock.keys, atol=1e-5, rtol=1e-5)
    assert not inspect_cache(found.past_key_values).compressed


def test_text_and_pictures_by_turns() -> None:
    """A dense request between two compressed ones disturbs neither."""
    model, backend = compiled_model()
    text, picture = make_inputs(((11,),)), make_inputs(SINGLE)
    first = run(model, picture, STEPS)
    dense = run(model, text, 3)
    again = run(model, picture, STEPS)
    assert again.kept == first.kept
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))
    assert dense.kept[-1] == [[list(range(14))] * SHAPE.layers]
    assert {"prefill", "decode", "dense"} == set(backend.graphs)


def test_requests_do_not_influence_each_other() -> None:
    model, _ = compiled_model()
    first_inputs, other_inputs = make_inputs(SINGLE), make_inputs(((8, 5),), seed=1)
    first = run(model, first_inputs, STEPS)
    other = run(model, other_inputs, STEPS)
    again = run(model, first_inputs, STEPS)
    assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))
    assert again.kept == first.kept != other.kept


def test_two_requests_at_once() -> None:
    """Steps of two requests by turns: each has its own cache."""
    model, _ = compiled_model()
    prompts = [make_inputs(SINGLE), make_inputs(SINGLE, seed=1)]
    alone = [run(model, inputs, 3) for inputs in prompts]
    started = [run(model, inputs, 0) for inputs in prompts]
    kept: list[list[Any]] = [[trace.kept[0]] for trace in started]
    with torch.no_grad():
        for step in range(3):
            for index, trace in enumerate(started):
                token = alone[index].tokens[step][:, None]
                model(input_ids=token, past_key_values=trace.cache, use_cache=True)
                kept[index].append(kept_of(trace.cache))
    assert kept == [trace.kept for trace in alone]


QUESTION = torch.tensor([[30, 41, 52, 63, 7]])


@pytest.mark.parametrize(
    ("prompts", "lowering"),
    [(SINGLE, "eager"), (PADDED, "eager"), pytest.param(PADDED, "inductor", marks=pytest.mark.slow)],
    ids=["single", "padded", "padded-inductor"],
)
def test_a_second_turn(prompts: Any, lowering: Any) -> None:
    first = expected_of(prompts)
    question = torch.cat([first.tokens[-1][:, None], QUESTION.expand(len(prompts), -1)], dim=1)
    expected = reference_turn(first, question, STEPS)
    assert expected.fragile == [None] * len(prompts)
    model, backend = compiled_model(lowering=lowering)
    trace = run(model, make_inputs(prompts), STEPS)
    turn = second_turn(model, trace.cache, trace.mask, question, STEPS)
    assert_same_run(turn, expected)
    for before, after in zip(trace.kept[-1], turn.kept[0], strict=True):
        for old, new in zip(before, after, strict=True):
            assert new[: len(old)] == old and len(new) == len(old) + question.shape[1]
    assert backend.graphs["continuation"] == 1


def test_generate_goes_on_with_a_second_turn() -> None:
    inputs = make_inputs(SINGLE)
    first = expected_of(SINGLE)
    expected = reference_turn(first, torch.cat([first.tokens[-1][:, None], QUESTION], dim=1), STEPS)
    model, _ = compiled_model()
    output = generate(model, inputs)
    history = {"input_ids": torch.cat([output.sequences, QUESTION], dim=1)}
    history["attention_mask"] = torch.ones_like(history["input_ids"])
    again = generate(model, history, past_key_values=output.past_key_values)
    check_generated(again, history, expected)


def test_one_picture_many_questions() -> None:
    """copy.deepcopy of a cache, then a different question on the copy and on the original."""
    model, _ = compiled_model()
    inputs, questions = make_inputs(PADDED), [QUESTION.expand(3, -1), QUESTION.flip(1).expand(3, -1) + 1]
    alone = []
    for question in questions:
        trace = run(model, inputs, 2)
        alone.append(second_turn(model, trace.cache, trace.mask, question, 4))
    trace = run(model, inputs, 2)
    kept = kept_of(trace.cache)
    copied = copy.deepcopy(trace.cache)
    assert kept_of(copied) == kept
    on_copy = second_turn(model, copied, trace.mask, questions[0], 4)
    assert kept_of(trace.cache) == kept, "the original changed with its copy"
    on_original = second_turn(model, trace.cache, trace.mask, questions[1], 4)
    assert kept_of(copied) == on_copy.kept[-1], "the copy changed with its original"
    assert_same_traces(on_copy, alone[0])
    assert_same_traces(on_original, alone[1])
    assert not torch.equal(on_copy.logits[-1], on_original.logits[-1])


@pytest.mark.parametrize("budget", [BUDGET, 1.0])
@pytest.mark.parametrize("prompts", [SINGLE, ((5, 9), (3, 8), (4, 12))], ids=["single", "padded"])
def test_beam_search(prompts: Any, budget: float) -> None:
    """A beam's score is that of its tokens on a cache that only ever saw these tokens.

    One picture a sample: transformers 5.17 hands the beams of a sample with two the wrong ones.
    """
    inputs, beams, steps = make_inputs(prompts), 3, 7
    model, _ = compiled_model(budget)
    output = generate(model, inputs, steps, num_beams=beams, num_return_sequences=beams)
    assert torch.isfinite(output.sequences_scores).all()
    report = inspect_cache(output.past_key_values)
    assert report.compressed and report.batch_size == beams * len(prompts)
    continuation = output.sequences[:, inputs["input_ids"].shape[1] :]
    # Which beams the cache holds at the end is up to transformers; whichever, they are samples of the same length.
    lengths = (inputs["attention_mask"].sum(1) + steps).repeat_interleave(beams).tolist()
    for kept, length in zip(kept_of(output.past_key_values), lengths, strict=True):
        for layer in kept:
            assert layer[:4] == [0, 1, 2, 3] and layer == sorted(set(layer)) and layer[-1] == length - 1
            assert budget < 1 or len(layer) == length
    compared = 0
    for beam in range(beams):
        chosen = continuation[beam::beams]
        expected = reference(
            make_model(SHAPE),
            inputs,
            steps,
            config=EvictionConfig(budget),
            image_token=IMAGE,
            forced=list(chosen.unbind(1)),
        )
        log = torch.stack([logits.log_softmax(-1) for logits in expected.logits], dim=1)
        scores = log.gather(2, chosen[:, :, None]).sum((1, 2)) / chosen.shape[1]
        for sample, fragile in enumerate(expected.fragile):
            if fragile is None:
                torch.testing.assert_close(output.sequences_scores[beams * sample + beam], scores[sample])
                compared += 1
    assert compared >= len(prompts)


def test_the_cache_of_a_compiled_model_holds_handles() -> None:
    """What the other tests of this file would not notice: that anything was compressed at all."""
    model, backend = compiled_model()
    trace = run(model, make_inputs(SINGLE), 2)
    assert all(type(layer.keys) is LogicalKV for layer in trace.cache.layers)
    assert trace.cache.get_seq_length() == 32
    assert backend.graphs["prefill"] == backend.graphs["decode"] == 1
    report = inspect_cache(trace.cache)
    assert report.compressed and int(report.segment_lengths.sum()) < 0.5 * 32 * SHAPE.layers
