"""A copy of a backend, pickled or not, is a fresh backend with the same options; and arguments that belong to it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgvkv_compile
from tests.backend.test_errors import UNREACHED, run_script
from tests.backend.tiny import prefill, prompt, step, tiny_llava
from tests.passes.decoder import Decoder
from tests.runtime.requests import handles
from tests.runtime.requests import prefill as toy_prefill
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import ConfigError, ForeignCacheError

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda backend: pickle.loads(pickle.dumps(backend)),
}
OPTIONS: dict[str, Any] = {"budget_of": "vision", "decode": "fixed", "growth_reserve": 8, "options": {"max_autotune": False}}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_fresh_backend_with_these_options(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda function, *graphs: registered.extend(graphs))  # Inductor registers, too
    backend = tgvkv_backend(0.3, **OPTIONS)
    backend.graphs["prefill"] = 3
    twin = COPIES[way](backend)
    assert type(twin) is type(backend) and twin.options == backend.options
    assert twin.graphs == {} and twin.cut is not backend.cut and twin.cut.strict
    assert [graphs is made.graphs for graphs, made in zip(registered, (backend, twin), strict=True)] == [True, True]


def test_a_copy_compiles_and_its_caches_are_its_own() -> None:
    backend = tgvkv_backend(0.3, lowering="eager")
    model = tiny_llava()
    model.compile(backend=backend)
    cache = prefill(model, prompt())
    twin = copy.deepcopy(backend)
    torch._dynamo.reset()
    model.compile(backend=twin)
    with pytest.raises(ForeignCacheError):
        step(model, copy.deepcopy(cache))
    assert step(model, prefill(model, prompt())).isfinite().all()
    assert twin.graphs == {"decode": 1, "prefill": 1} and backend.graphs == {"prefill": 1}


def test_a_backend_in_what_is_copied_with_a_model() -> None:
    model = tiny_llava(layers=1)
    model.backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=model.backend)
    expected = prefill(model, prompt())
    twin = copy.deepcopy(model)
    assert twin.backend is not model.backend
    twin.compile(backend=twin.backend)
    torch.testing.assert_close(step(twin, prefill(twin, prompt())), step(model, expected))


def test_a_copy_that_is_never_reached_says_so() -> None:
    said = run_script("""
        import copy
        backend = tgvkv_compile.tgvkv_backend(0.3, lowering="eager")
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
        twin = copy.deepcopy(backend)
    """)
    assert said.count(UNREACHED) == 1


# Arguments of compile() that belong to the backend


@pytest.mark.parametrize(
    ("given", "shown", "moved"),
    [
        ({"mode": "reduce-overhead"}, "mode='reduce-overhead'", "mode='reduce-overhead'"),
        ({"options": {"max_autotune": True}}, "options={'max_autotune': True}", "options={'max_autotune': True}"),
        (
            {"options": {"max_autotune": True, "budget": 0.1}},
            "options={'max_autotune': True, 'budget': 0.1}",
            "budget=0.1, options={'max_autotune': True}",
        ),
    ],
)
def test_arguments_beside_the_backend(given: dict[str, Any], shown: str, moved: str) -> None:
    for model, call in ((tiny_llava(), lambda m: m.generate(**prompt(), max_new_tokens=2)), (Decoder(), toy_prefill)):
        model.compile(backend=tgvkv_backend(0.4, lowering="eager"), **given)
        with pytest.raises(ConfigError) as caught:
            call(model)
        assert str(caught.value).startswith(f"{shown} was given to compile() beside the backend")
        assert f"tgvkv_backend({moved})" in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrapped_function_is_told_as_well() -> None:
    model = tiny_llava()
    model.forward = torch.compile(model.forward, backend=tgvkv_backend(0.4, lowering="eager"), mode="reduce-overhead")
    with pytest.raises(ConfigError, match=r"mode='reduce-overhead' was given to compile\(\)"), torch.no_grad():
        model(**prompt())


def test_what_says_nothing_is_let_through() -> None:
    for given in ({"mode": "default"}, {"options": {}}):
        model = Decoder()
        model.compile(backend=tgvkv_backend(0.4, lowering="eager"), **given)
        assert handles(toy_prefill(model))
    tgvkv_compile.compile(Decoder(), 0.4, mode="reduce-overhead")
