"""The options of the backend: one record, and functions that have its signature."""

import dataclasses
import inspect

import pytest

from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend.options import OPTION_NAMES, BackendOptions
from tgvkv_compile.config import EvictionConfig


def test_the_backend_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(tgvkv_backend).parameters
    assert tuple(shown) == OPTION_NAMES and OPTION_NAMES[0] == "budget"
    defaults = {name: one.default for name, one in shown.items()}
    assert defaults.pop("budget") is None and BackendOptions().budget == 0.05  # None, so that `memory` may be in its place
    assert {"budget": 0.05, **defaults} == dataclasses.asdict(BackendOptions())
    assert {one.kind for name, one in shown.items() if name != "budget"} == {inspect.Parameter.KEYWORD_ONLY}


def test_only_the_budget_is_given_by_position() -> None:
    made = tgvkv_backend(0.3, decode="keep", configure_dynamo=False).options
    assert made == tgvkv_backend(budget=0.3, decode="keep", configure_dynamo=False).options
    assert made.eviction == EvictionConfig(0.3, decode="keep")
    with pytest.raises(TypeError, match="one argument by position, budget"):
        tgvkv_backend(0.3, "vision", configure_dynamo=False)
    with pytest.raises(TypeError, match="budget"):
        tgvkv_backend(0.3, budget=0.3, configure_dynamo=False)  # type: ignore[misc]
