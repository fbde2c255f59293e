"""A warning names releases that are newer than any that this package was tried on."""

import sys
import types
import warnings

import pytest
import torch

from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend.versions import release, warn_of_untried


@pytest.fixture(autouse=True)
def untold() -> None:
    warn_of_untried.cache_clear()


def test_releases_that_were_tried_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="5.24.1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untried()


def test_a_newer_one_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.0.0.dev20270101+cu140")
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="6.1.0rc1"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tgvkv_backend(0.5, configure_dynamo=False)
        tgvkv_backend(0.5, configure_dynamo=False)
    (told,) = [str(one.message) for one in seen if "never tried" in str(one.message)]
    assert "torch 9.0.0.dev20270101+cu140 and transformers 6.1.0rc1" in told


@pytest.mark.parametrize(
    ("version", "number"), [("2.14.1+cu130", (2, 14)), ("5.24.0", (5, 24)), ("6.0.dev1", (6, 0)), ("5.7rc2", (5, 7))]
)
def test_release(version: str, number: tuple[int, int]) -> None:
    assert release(version) == number
