"""Several turns on one cache: texts, new pictures, copies and crops, against the reference that follows the same rules."""

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import kept_of, positions_of
from tests.support.sharing import Sharing
from tests.support.talking import Conversation
from tgvkv_compile import inspect_cache, tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import PaddingError, StaleCacheError

GROUPED = Shape(layers=2, heads=4, kv_heads=2, side=3, seed=7)
MULTI = Shape(layers=2, heads=2, kv_heads=2, side=3, seed=3)
SINGLE = ((5, 9),)
PADDED = ((5, 9), (3, 2, 6), (4, 12))
SECOND = ((4, 6), (7,), (2, 3, 5))
"""A picture turn: one picture, none, two; so it is padded, too."""


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: they share what dynamo traced."""
    torch.manual_seed(0)


@functools.cache
def sharing(shape: Shape) -> Sharing:
    return Sharing(make_model(shape), tgvkv_backend(0.3, lowering="eager"))


def compiled(shape: Shape, config: EvictionConfig, **options: Any) -> tuple[Any, Any]:
    """A model, the same for each shape, compiled in place this way until the next call; and its backend."""
    given = {name: getattr(config, name) for name in config.__dataclass_fields__}
    shared, backend = sharing(shape), tgvkv_backend(**given, **{"lowering": "eager", **options})
    shared.asked = backend
    return shared.model, backend


def start(shape: Shape, config: EvictionConfig, **options: Any) -> tuple[Conversation, Any]:
    model, backend = compiled(shape, config, **options)
    return Conversation(model, make_model(shape), config), backend


def turn(prompts: Any, shape: Shape, seed: int) -> dict[str, Tensor]:
    return make_inputs(prompts, side=shape.side, seed=seed)


def text(samples: int, count: int, seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 88, (samples, count), generator=generator)}


@pytest.mark.parametrize(
    ("shape", "prompts", "second", "lowering"),
    [
        pytest.param(GROUPED, PADDED, SECOND, "eager", id="grouped-padded"),
        pytest.param(MULTI, SINGLE, ((3, 7),), "eager", id="multi-single"),
        pytest.param(GROUPED, PADDED, SECOND, "inductor", id="inductor", marks=pytest.mark.slow),
    ],
)
def test_pictures_in_later_turns(shape: Shape, prompts: Any, second: Any, lowering: Any) -> None:
    """Question, answer, picture, answer, text, answer, picture, answer; the reserve is used up on the way."""
    talk, backend = start(shape, EvictionConfig(0.3), lowering=lowering, growth_reserve=3)
    samples = len(prompts)
    talk.say(turn(prompts, shape, 0)).steps(4)
    talk.say(turn(second, shape, 5)).steps(5)
    talk.say(text(samples, 6)).steps(2)
    talk.say(turn(((2, 4),) * samples, shape, 6)).steps(5)
    assert talk.session.fragile == [None] * samples, "choose another seed: float noise decides here"
    assert talk.compared == 20 * samples
    assert backend.graphs["vision_continuation"] >= 1 and backend.graphs["continuation"] >= 1
    report = inspect_cache(talk.cache)
    assert report.logical_length == talk.mask.shape[1]
    assert int(report.segment_lengths.sum()) < 0.75 * int(talk.mask.sum()) * shape.layers


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("sdpa", {"budget": 0.3}),
        ("sdpa", {"budget": 0.4, "budget_of": "vision", "decode": "fixed"}),
        ("eager", {"budget": 0.3, "budgeting": "waterfill"}),
        ("sdpa", {"budget": 1.0}),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_first_picture_after_turns_of_text(attention: str, options: dict[str, Any], samples: int) -> None:
    """Text, answer, text, then a picture: what was said before is all there, padding among it, and is shared out now."""
    shape = dataclasses.replace(GROUPED, attention=attention)
    talk, backend = start(shape, EvictionConfig(**options), growth_reserve=3)
    first, second = text(samples, 7), text(samples, 5, seed=4)
    for inputs, padded in ((first, (0, 3, 1)), (second, (2, 0, 1))):
        left = torch.tensor(padded[:samples])[:, None] if samples > 1 else torch.zeros(1, 1)
        inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) >= left).long()
    talk.say(first).steps(2).say(second).steps(1)
    talk.say(turn(SECOND[:samples], shape, 5)).steps(5)
    talk.say(text(samples, 6)).steps(2)
    talk.say(turn(((2, 4),) * samples, shape, 6)).steps(3)
    assert talk.session.fragile == [None] * samples, "choose another seed: float noise decides here"
    assert talk.compared == 18 * samples
    assert backend.graphs["late_prefill"] >= 1 and backend.graphs["vision_continuation"] >= 1
    kept = int(inspect_cache(talk.cache).segment_lengths.sum())
    everything = int(talk.mask.sum()) * shape.layers
    assert kept == everything if options["budget"] == 1.0 else kept < 0.9 * everything


def test_written_out_attention_and_a_vision_budget() -> None:
    shape = Shape(layers=2, heads=4, kv_heads=1, side=3, seed=5, attention="eager")
    talk, _ = start(shape, EvictionConfig(0.3, budget_of="vision", decode="fixed"))
    talk.say(turn(PADDED, shape, 0)).steps(3).say(turn(SECOND, shape, 5)).steps(3)
    assert talk.compared == 8 * 3


def test_the_whole_budget_is_the_uncompiled_model() -> None:
    model, stock = compiled(GROUPED, EvictionConfig(1.0))[0], make_model(GROUPED)
    caches: list[Any] = [None, None]
    mask = torch.empty(3, 0, dtype=torch.int64)
    with torch.no_grad():
        for number, prompts in enumerate((PADDED, SECOND)):
            inputs = turn(prompts, GROUPED, number)
            mask = inputs["attention_mask"] = torch.cat([mask, inputs["attention_mask"]], dim=1)
            outputs = []
            for index, each in enumerate((model, stock)):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
                outputs.append(each(**inputs, position_ids=positions, past_key_values=caches[index], use_cache=True))
                caches[index] = outputs[-1].past_key_values
            torch.testing.assert_close(outputs[0].logits[:, -1], outputs[1].logits[:, -1], atol=1e-4, rtol=1e-4)
    assert kept_of(caches[0]) == [[list(range(length))] * 2 for length in mask.sum(1).tolist()]


def test_generate_takes_a_new_picture() -> None:
    """The whole history, the new pictures alone, and the cache of the turn before."""
    config = EvictionConfig(0.3)
    model, backend = compiled(GROUPED, config)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first, second = turn(SINGLE, GROUPED, 0), turn(((3, 7),), GROUPED, 5)
    output = model.generate(**first, **options)
    history = torch.cat([output.sequences, second["input_ids"]], dim=1)
    again = model.generate(
        input_ids=history,
        attention_mask=torch.ones_like(history),
        pixel_values=second["pixel_values"],
        past_key_values=output.past_key_values,
        **options,
    )
    assert backend.graphs["vision_continuation"] == 1
    talk = Conversation(model, make_model(GROUPED), config)
    talk.say(first).steps(3)
    # The last token that was generated is in the history and not yet in the cache.
    second["input_ids"] = torch.cat([talk.tokens[-1][:, None], second["input_ids"]], dim=1)
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    talk.say(second).steps(3)
    assert again.sequences[0, history.shape[1] :].tolist() == torch.cat(talk.tokens[-4:]).tolist()
    assert kept_of(again.past_key_values) == talk.session.kept
    torch.testing.assert_close(again.logits[-1], talk.logits, atol=1e-4, rtol=1e-4)


def test_copies_and_crops() -> None:
    """Texts, pictures and steps by turns on copies of one cache; then tokens are taken back and others asked."""
    talk, _ = start(GROUPED, EvictionConfig(0.3), growth_reserve=2)
    talk.say(turn(SINGLE, GROUPED, 0)).steps(2)
    first, second, third = talk.copy(), talk.copy(), talk.copy()
    first.say(turn(((3, 7),), GROUPED, 5)).steps(2)
    second.say(text(1, 5)).steps(1)
    talk.steps(2)
    fourth = first.copy().say(text(1, 4))
    second.say(turn(((1, 5),), GROUPED, 6)).steps(2)
    first.say(turn(((0, 0, 3),), GROUPED, 7))
    third.say(turn(((3, 7),), GROUPED, 5)).steps(2)  # what `first` did, after all the others
    talk.say(turn(((2, 2),), GROUPED, 8)).steps(1)
    fourth.steps(2)
    first.steps(2)
    # Back to before the last picture, and into the first prompt; what is gone does not come back.
    for length, other in ((third.mask.shape[1] - 5, third), (18, first), (23, second)):
        before = kept_of(other.cache)
        other.crop(length)
        assert kept_of(other.cache) == [[[p for p in layer if p < length] for layer in row] for row in before]
        other.say(text(1, 5, seed=length)).steps(3).say(turn(((1, 6),), GROUPED, length)).steps(2)
    assert all(other.session.fragile == [None] for other in (talk, first, second, third, fourth))


def test_a_batch_is_cropped_after_eviction() -> None:
    talk, _ = start(GROUPED, EvictionConfig(0.3))
    talk.say(turn(PADDED, GROUPED, 0))
    whole, length = kept_of(talk.cache), talk.mask.shape[1]
    talk.steps(6).crop(length)
    left = kept_of(talk.cache)
    assert left != whole and all(set(a) <= set(b) for x, y in zip(left, whole, strict=True) for a, b in zip(x, y, strict=True))
    talk.say(text(3, 5)).steps(4)
    assert talk.session.fragile == [None] * 3


def test_right_padding_of_a_picture_turn_is_refused_and_changes_nothing() -> None:
    talk, _ = start(GROUPED, EvictionConfig(0.3))
    talk.say(turn(((5, 9), (3, 8)), GROUPED, 0)).steps(1)
    wrong = turn(((4, 6), (4, 3)), GROUPED, 5)
    wrong = {name: value.flip(1) if value.dim() == 2 else value for name, value in wrong.items()}
    mask = torch.cat([talk.mask, wrong["attention_mask"]], dim=1)
    wrong["position_ids"] = positions_of(mask)[:, -wrong["input_ids"].shape[1] :]
    kept, length = kept_of(talk.cache), talk.cache.get_seq_length()
    old = copy.copy(talk.cache)  # the same handles, which a later call replaces in the layers of the other
    old.layers = [copy.copy(layer) for layer in talk.cache.layers]
    with torch.no_grad(), pytest.raises(PaddingError, match="sample 1 of the batch is padded on the right"):
        talk._compiled(**{**wrong, "attention_mask": mask}, past_key_values=talk.cache, use_cache=True)
    assert talk.cache.get_seq_length() == length and kept_of(talk.cache) == kept
    talk.say(turn(((4, 6), (4, 3)), GROUPED, 5)).steps(2)
    with torch.no_grad(), pytest.raises(StaleCacheError, match="copy.deepcopy"):
        talk._compiled(**{**wrong, "attention_mask": mask}, past_key_values=old, use_cache=True)


CONFIGS = (EvictionConfig(0.3), EvictionConfig(9, budget_of="vision", budgeting="waterfill", decode="fixed", sink_tokens=2))
_PICTURES = st.lists(st.integers(0, 6), min_size=2, max_size=3).map(tuple)
_TEXT = st.tuples(st.integers(1, 8))
_ACTIONS = st.one_of(
    st.tuples(st.just("picture"), st.tuples(_PICTURES, st.one_of(_PICTURES, _TEXT)).flatmap(st.permutations).map(tuple)),
    st.tuples(st.just("text"), st.integers(2, 6)),
    st.tuples(st.just("steps"), st.integers(1, 4)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
)


@functools.cache
def _backend_and_stock(config: EvictionConfig) -> tuple[Any, Any]:
    return compiled(GROUPED, config, growth_reserve=2)[1], make_model(GROUPED)


@pytest.mark.parametrize("config", CONFIGS, ids=["ratio", "vision-fixed"])
@given(
    prompts=st.tuples(_PICTURES, _PICTURES),
    actions=st.lists(st.tuples(st.integers(0, 2), _ACTIONS), min_size=3, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=4)
def test_any_sequence_of_turns(config: EvictionConfig, prompts: Any, actions: Any, seed: int) -> None:
    """A batch of two; each action is on one of the conversations that have branched off by then."""
    backend, stock = _backend_and_stock(config)
    sharing(GROUPED).asked = backend
    model = sharing(GROUPED).model
    talks = [Conversation(model, stock, config).say(turn(prompts, GROUPED, seed))]
    turned = [False]  # the turns of a batch may be padded, and then nothing can be taken back
    for number, (which, (action, argument)) in enumerate(actions):
        index = which % len(talks)
        talk = talks[index]
        event(action)
        if action == "picture":
            talk.say(turn(argument, GROUPED, 100 + number))
        elif action == "text":
            talk.say(text(2, argument, seed=number))
        elif action == "steps":
            talk.steps(argument)
        elif action == "copy":
            talks.append(talk.copy())
            turned.append(turned[index])
        elif not turned[index]:
            talk.crop(talk.mask.shape[1] - argument)
        turned[index] = turned[index] or action in ("picture", "text")
    for talk in talks:
        talk.steps(2)
    event(f"compared in full: {all(talk.session.fragile == [None] * 2 for talk in talks)}")
