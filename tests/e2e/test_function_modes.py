"""Requests under torch function modes: a default device, and what users write themselves. Nothing may come out otherwise."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import Kept, kept_of
from tgvkv_compile import inspect_cache, tgvkv_backend

SHAPE = Shape(layers=2, seed=7)
Said = tuple[list[int], Kept]


class Counting(TorchFunctionMode):
    """A mode that users write: it looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def several() -> Iterator[None]:
    with torch.device("cpu"), Counting(), Counting():
        yield


Mode = Callable[[], contextlib.AbstractContextManager[Any]]
MODES: dict[str, Mode] = {
    "default-device": default_device,
    "device": lambda: torch.device("cpu"),  # type: ignore[dict-item, return-value]
    "another-device": lambda: torch.device("meta"),  # type: ignore[dict-item, return-value]  # than the model's
    "of-the-user": Counting,
    "several": several,
}


def compiled(lowering: Any = "eager") -> Any:
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(0.3, lowering=lowering, growth_reserve=3))
    return model


def ids(*tokens: int) -> Any:
    return torch.tensor([tokens], device="cpu")


def generated(modes: Iterator[Mode], model: Any, **options: Any) -> Said:
    """Two samples, one of them padded."""
    inputs = make_inputs(((5, 9), (3, 4)))
    with next(modes)():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)
        return output.sequences.flatten().tolist(), kept_of(output)


def beams(modes: Iterator[Mode], model: Any) -> Said:
    return generated(modes, model, num_beams=2)


@torch.no_grad()
def conversation(modes: Iterator[Mode], model: Any, *, picture: bool = False) -> Said:
    """Direct calls: a prompt, a turn, a copy, a crop, steps until the arena grows."""
    inputs, said = make_inputs(((5, 9),)), []

    def say(cache: Any, **given: Any) -> Any:
        with next(modes)():
            output = model(**given, past_key_values=cache, use_cache=True)
            said.append(int(output.logits[0, -1].argmax()))
            return copy.deepcopy(output.past_key_values)

    cache = say(None, **inputs)
    cache = say(cache, input_ids=ids(5, 6, 7))
    if picture:
        cache = say(cache, input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with next(modes)():
        cache.crop(-2)
    for token in range(20, 25):
        cache = say(cache, input_ids=ids(token))
    with next(modes)():
        report = inspect_cache(cache)
        assert report.compressed and str(report) and report.segment_lengths.device.type == "cpu"
        return said, kept_of(cache)


def pictures(modes: Iterator[Mode], model: Any) -> Said:
    """With a new picture in a later turn."""
    return conversation(modes, model, picture=True)


REQUESTS: dict[str, Callable[[Iterator[Mode], Any], Said]] = {
    "generate": generated,
    "beams": beams,
    "conversation": conversation,
    "pictures": pictures,
}


@functools.cache
def expected(request: str) -> Said:
    return REQUESTS[request](itertools.repeat(contextlib.nullcontext), compiled())


CASES = [
    *(("conversation", mode) for mode in MODES),
    *((request, "several") for request in REQUESTS if request != "conversation"),
    ("generate", "another-device"),
]


@pytest.mark.parametrize(("request_", "mode"), CASES)
def test_requests_under_a_mode(request_: str, mode: str) -> None:
    assert REQUESTS[request_](itertools.repeat(MODES[mode]), compiled()) == expected(request_)


@pytest.mark.slow
def test_requests_under_modes_through_inductor() -> None:
    assert conversation(itertools.repeat(several), compiled("inductor")) == expected("conversation")


def test_a_mode_may_come_and_go_between_calls() -> None:
    order = itertools.cycle([Counting, contextlib.nullcontext, *MODES.values(), contextlib.nullcontext])
    assert conversation(order, compiled()) == expected("conversation")


def test_reports_are_on_the_cpu_whatever_the_default_device_is() -> None:
    """Of a cache that was never compressed, too."""
    model = compiled()
    with torch.no_grad(), torch.device("meta"):
        cache = model(input_ids=ids(*range(3, 12)), use_cache=True).past_key_values
        report = inspect_cache(cache)
        assert not report.compressed
        assert report.kept_positions(1).tolist() == list(range(9))
        assert report.segment_lengths.tolist() == [[9, 9]] and report.keep_rates.tolist() == [[1.0, 1.0]]
