"""Compiling a function by itself: for the cut, and for a run that only looks."""

import inspect
from collections.abc import Callable
from typing import Any

import torch


def compile_apart(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` such that other compiled code of the same functions neither sees it nor pays for it."""
    # Older releases than 2.13 have no such argument; entries are told apart by their backend there too, but share a limit.
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(function, backend=backend, **apart)  # type: ignore[call-overload, no-any-return]
