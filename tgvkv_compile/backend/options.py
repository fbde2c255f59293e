"""The options of the backend as one frozen record."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tgvkv_compile.config import (
    CompileMode,
    EvictionConfig,
    Lowering,
    OnUnsupported,
    check_choice,
    check_count,
    check_names,
)
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.pipeline import check_stop_after

GROWTH_RESERVE = 64
"""Decode steps that a fresh arena leaves room for; it doubles when they are used up."""


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """Everything that `tgvkv_backend` takes; see there."""

    eviction: EvictionConfig
    lowering: Lowering = "inductor"
    mode: CompileMode | None = None
    options: dict[str, Any] | None = None
    on_unsupported: OnUnsupported = "raise"
    configure_dynamo: bool = True
    growth_reserve: int = GROWTH_RESERVE
    prefill_cap: float | None = None
    dump_graphs: str | None = None
    stop_after: str | None = None

    def __post_init__(self) -> None:
        check_choice("lowering", self.lowering, Lowering)
        check_choice("mode", self.mode, CompileMode, optional=True)
        check_choice("on_unsupported", self.on_unsupported, OnUnsupported)
        check_count("growth_reserve", self.growth_reserve, minimum=1)
        check_stop_after(self.stop_after)
        _check_cap(self.prefill_cap, self.eviction)
        for name in ("mode", "options"):
            if getattr(self, name) is not None and self.lowering != "inductor":
                raise ConfigError(f"{name}={getattr(self, name)!r} is for lowering='inductor', not {self.lowering!r}")
        if self.options is not None and not isinstance(self.options, dict):
            raise ConfigError(f"options={self.options!r} must be a dict of Inductor options")


def _check_cap(cap: object, eviction: EvictionConfig) -> None:
    if cap is None:
        return
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 1.0 <= cap < math.inf:
        raise ConfigError(f"prefill_cap={cap!r} must be a number >= 1, a multiple of the mean budget, or None")
    if eviction.budget_of == "vision":
        raise ConfigError(
            f"prefill_cap={cap!r} needs budget_of='all': with budget_of='vision' the size of the mean budget is known only "
            "from the prompt's data"
        )


def _names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record) if field.name != "eviction")


OPTION_NAMES = (*_names(EvictionConfig), *_names(BackendOptions))


def misplaced(given: Mapping[str, Any]) -> ConfigError:
    """The error for arguments of `torch.compile` that belong to the backend: `mode`, `options`, and ours among the latter."""
    options = dict(given.get("options") or {})
    ours = {name: options.pop(name) for name in list(options) if name in OPTION_NAMES}
    moved = {**ours, **{name: value for name, value in given.items() if name != "options"}}
    if options:
        moved["options"] = options
    return ConfigError(
        f"{_shown(given)} was given to compile() beside the backend; give it to the backend: tgvkv_backend({_shown(moved)})"
    )


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def read_options(given: Mapping[str, Any], *, where: str) -> BackendOptions:
    """The options from keyword arguments.

    Args:
        given: Options by name; those left out have their defaults.
        where: Who takes them, for the message.

    Raises:
        ConfigError: An option has a value that cannot be used.
        UnknownOptionError: There is no such option.
    """
    check_names(given, OPTION_NAMES, where=where)
    of_eviction = _names(EvictionConfig)
    eviction = EvictionConfig(**{name: value for name, value in given.items() if name in of_eviction})
    return BackendOptions(eviction, **{name: value for name, value in given.items() if name not in of_eviction})
