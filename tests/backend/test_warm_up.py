"""After a warm-up, requests compile nothing, and nothing tells that there was one."""

import copy
import gc
import random
from typing import Any

import pytest
import torch

import tgvkv_compile
from bench.answers import preset_of
from bench.models import make_whole_model
from bench.photos import requests
from tests.families.family import make_inputs, make_model
from tests.families.table import FAMILIES
from tests.support.memory import Watch
from tgvkv_compile import inspect_cache, tgvkv_backend, warm_up
from tgvkv_compile.backend import warm_up as module
from tgvkv_compile.digits import load_model, load_processor
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.runtime.logical import LogicalKV

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl")
ONE = ((5, "image", 9),)


def compiled(name: str = "llava") -> tuple[Any, Any, dict[str, int]]:
    """A family, its compiled model and the counts of its backend."""
    family = FAMILIES[name]
    model = make_model(family)
    backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend)
    return family, model, backend.graphs


def ask(family: Any, model: Any, prompts: Any, *, seed: int, tokens: int = 4) -> Any:
    inputs = make_inputs(family, model, prompts, seed=seed)
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)


OTHERS = (
    ((9, "image", 4),),
    ((2, "image", 30),),
    ((2, "image", 3, "image", 4),),
    ((2, "image", 3), (5, "image", 8)),
    ((6, "image", 8), (2, "image", 2), (5, "image", 12)),
    ((3, "image", 5), (2, "image", 1, "image", 7), (4, "image", 1), (9, "image", 2)),
)
"""Of other lengths, numbers of pictures and batch sizes."""


@pytest.mark.parametrize("name", NAMES)
def test_later_requests_compile_nothing(name: str) -> None:
    family, model, graphs = compiled(name)
    warm_up(model, make_inputs(family, model, ONE), batch_sizes=(1, 2))
    assert graphs == {"prefill": 2, "decode": 2}
    for seed, prompts in enumerate(OTHERS, start=1):
        assert inspect_cache(ask(family, model, prompts, seed=seed)).compressed
        assert graphs == {"prefill": 2, "decode": 2}, prompts


def test_pictures_of_other_sizes_compile_nothing() -> None:
    model = make_whole_model(preset_of(layers=1, hidden=64))
    backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend)
    first, *later = requests(preset_of(layers=1, hidden=64), 4, 1)
    warm_up(model, first)
    assert backend.graphs == {"prefill": 1, "decode": 1}
    for inputs in later:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert backend.graphs == {"prefill": 1, "decode": 1}, inputs["image_grid_thw"]


def test_one_batch_size_at_a_time() -> None:
    family, model, graphs = compiled()
    sample = make_inputs(family, model, ONE)
    warm_up(model, sample)
    ask(family, model, ((7, "image", 2),), seed=1)
    assert graphs == {"prefill": 1, "decode": 1}  # what is for one sample, and not more
    ask(family, model, ((7, "image", 2), (1, "image", 5)), seed=2)
    assert graphs == {"prefill": 2, "decode": 2}


def test_text() -> None:
    family, model, graphs = compiled()
    warm_up(model, make_inputs(family, model, ((9,),)))
    warm = dict(graphs)
    assert set(warm) == {"dense"}
    ask(family, model, ((14,),), seed=2)
    assert graphs == warm


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_same(name: str) -> None:
    """As those of a model that was not warmed up, in a conversation that a request had begun before."""
    family, model, _ = compiled(name)
    _, other, _ = compiled(name)
    for each in (model, other):
        ask(family, each, ((4, "image", 6),), seed=5)
        if each is model:
            warm_up(model, make_inputs(family, model, ONE), batch_sizes=(1, 2))
    prompts = ((3, "image", 8),)
    found, expected = (ask(family, each, prompts, seed=7, tokens=12).sequences for each in (model, other))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(name: str) -> None:
    family, model, _ = compiled(name)
    sample = make_inputs(family, model, ONE)
    before = {path: _attributes(module) for path, module in model.named_modules()}
    given = copy.deepcopy(sample)
    config = model.generation_config
    said = copy.deepcopy(config.to_dict())
    watch = Watch()
    others = _live_handles()  # of tests before this one
    states = torch.get_rng_state(), random.getstate()
    warm_up(model, sample, batch_sizes=(1, 2))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert model.generation_config is config and config.to_dict() == said
    assert {path: _attributes(module) for path, module in model.named_modules()} == before
    assert getattr(model.model, "rope_deltas", None) is None
    assert sample.keys() == given.keys() and all(torch.equal(sample[key], given[key]) for key in given)
    held = [handle for handle in _live_handles() if not any(handle is other for other in others)]
    assert held == [] and watch.bytes(at_least=10_000) == 0  # an arena is larger


def _attributes(module: torch.nn.Module) -> dict[str, int]:
    return {name: id(value) for name, value in vars(module).items() if name != "_compiled_call_impl"}


def _live_handles() -> list[LogicalKV]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), LogicalKV)]


def test_what_a_request_left_is_still_there() -> None:
    """A user's own `rope_deltas`: a warm-up between two calls of a conversation that is fed by hand."""
    family, model, _ = compiled("qwen2_5_vl")
    ask(family, model, ((4, "image", 6),), seed=5)
    deltas = model.model.rope_deltas
    assert deltas is not None
    value = deltas.clone()
    warm_up(model, make_inputs(family, model, ONE))
    assert model.model.rope_deltas is deltas and torch.equal(deltas, value)


def test_the_users_way_of_generating_is_kept() -> None:
    """Beams make a batch of one sample; sampling is outside of the model."""
    family, model, graphs = compiled()
    model.generation_config.num_beams = 2
    model.generation_config.do_sample = True
    state = torch.get_rng_state()
    warm_up(model, make_inputs(family, model, ONE))
    assert torch.equal(torch.get_rng_state(), state)
    warm = dict(graphs)
    model.generate(**make_inputs(family, model, ((8, "image", 3),), seed=2), max_new_tokens=3)
    assert graphs == warm


def test_an_answer_that_would_end_at_once_is_as_long_as_asked() -> None:
    family, model, graphs = compiled()
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))[3:]
    warm_up(model, make_inputs(family, model, ONE))
    assert graphs["decode"] >= 1


def test_a_processor_is_asked_about_a_grey_picture() -> None:
    model: Any = load_model()
    backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend)
    warm_up(model, load_processor())
    assert backend.graphs["prefill"] >= 1 and backend.graphs["decode"] == 1


@pytest.mark.parametrize("way", ["by_name", "forward", "inner", "compile"])
def test_ways_to_compile(way: str) -> None:
    family = FAMILIES["llava"]
    model = make_model(family)
    backend = tgvkv_backend(0.3, lowering="eager")
    if way == "by_name":
        model.compile(backend="tgvkv", options={"budget": 0.3, "lowering": "eager"})
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    elif way == "inner":
        model.model.compile(backend=backend)
    else:
        tgvkv_compile.compile(model, 0.3, lowering="eager")
    warm_up(model, make_inputs(family, model, ONE))


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_a_model_that_was_not_compiled_with_this_backend(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told at once: nothing is compiled, nothing is run."""
    family = FAMILIES["llava"]
    model = make_model(family)
    if backend is not None:
        model.compile(backend=backend)
    sample = make_inputs(family, model, ONE)
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(ConfigError, match="LlavaForConditionalGeneration.*was not compiled with this backend"):
        warm_up(model, sample)


def test_what_it_cannot_take() -> None:
    family, model, graphs = compiled()
    sample = make_inputs(family, model, ONE)
    for options, problem in (
        ({"new_tokens": 1}, "new_tokens=1 must be an int >= 2"),
        ({"batch_sizes": (1, 0)}, "batch_sizes=0 must be an int >= 1"),
        ({"batch_sizes": ()}, r"batch_sizes=\(\) names no batch size"),
    ):
        with pytest.raises(ConfigError, match=problem):
            warm_up(model, sample, **options)
    two = make_inputs(family, model, ONE * 2)
    with pytest.raises(ConfigError, match=r"'input_ids'\] is \[2, 30\]; give one sample"):
        warm_up(model, two)
    with pytest.raises(ConfigError, match=r"'input_ids'\] is None; give one sample"):
        warm_up(model, {"pixel_values": sample["pixel_values"]})
    with pytest.raises(ConfigError, match="inputs is a Tensor; give a mapping"):
        warm_up(model, sample["input_ids"])
    with pytest.raises(ConfigError, match=r"wrapped by torch.compile\(\)"):
        warm_up(torch.compile(model, backend="eager"), sample)
    with pytest.raises(ConfigError, match="model is a Linear; warm_up"):
        warm_up(torch.nn.Linear(2, 2), sample)
    assert graphs == {}


def test_a_failing_request_leaves_nothing_behind_either(monkeypatch: pytest.MonkeyPatch) -> None:
    family, model, _ = compiled("qwen2_5_vl")
    sample = make_inputs(family, model, ONE)

    def fails(self: Any, **_: Any) -> None:
        self.model.rope_deltas = torch.ones(1)
        self.left_over = True
        torch.rand(3)
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model), "generate", fails)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no memory"):
        warm_up(model, sample)
    assert model.model.rope_deltas is None and not hasattr(model, "left_over")
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_padded_on_the_left_and_pictures_follow_each_other() -> None:
    family, model, _ = compiled("qwen2_5_vl")
    sample = make_inputs(family, model, ONE)
    length = sample["input_ids"].shape[1]
    batch = module._batch({**sample, "names": ["a"], "scale": 2.0}, 3)
    more = module.PADDING
    assert batch["attention_mask"].sum(1).tolist() == [length + more, length, length + more]
    assert bool(batch["attention_mask"][:, -1].all()) and batch["input_ids"].shape == (3, length + more)
    assert torch.equal(batch["input_ids"][1, more:], sample["input_ids"][0])
    assert torch.equal(batch["image_grid_thw"], sample["image_grid_thw"].repeat(3, 1))
    assert batch["names"] == ["a"] * 3 and batch["scale"] == 2.0
