"""The options of the backend as one frozen record."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from tgvkv_compile.config import (
    BudgetOf,
    CompileMode,
    EvictionConfig,
    Lowering,
    OnUnsupported,
    check_choice,
    check_count,
    check_names,
    names_of,
)
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.pipeline import check_stop_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendOptions(EvictionConfig):
    """All options of the backend: those of `EvictionConfig`, and what the backend itself needs to know.

    Attributes:
        lowering: `"inductor"`; `"aot_eager"` and `"eager"` are for debugging.
        mode: Inductor's mode, as in `torch.compile(mode=...)`.
        options: Inductor's options, as in `torch.compile(options=...)`.
        on_unsupported: What to do with a decoder that cannot be rewritten: `"raise"`, or `"passthrough"` (run it
            uncompressed, and say so once).
        configure_dynamo: Set dynamo's process-wide flags that a VLM needs (see `backend.dynamo.configure`).
        growth_reserve: Decode steps that a fresh cache has room for; it grows geometrically when they are used up.
        prefill_cap: Bounds the memory of a prefill: at most this multiple of the mean budget is kept of each layer as soon
            as the layer is done, so that the full KV of all layers never exists at once. Exact wherever no layer is to keep
            more; one that is keeps its best tokens up to that. Needs `budget_of="all"`. None: no such bound.
        dump_graphs: Folder for readable graphs before and after each pass.
        stop_after: Name of the last pass to run. The graphs can then be looked at; the model runs uncompressed.
    """

    lowering: Lowering = "inductor"
    mode: CompileMode | None = None
    options: dict[str, Any] | None = None
    on_unsupported: OnUnsupported = "raise"
    configure_dynamo: bool = True
    growth_reserve: int = 64
    prefill_cap: float | None = None
    dump_graphs: str | None = None
    stop_after: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lowering", self.lowering, Lowering)
        check_choice("mode", self.mode, CompileMode, optional=True)
        check_choice("on_unsupported", self.on_unsupported, OnUnsupported)
        check_count("growth_reserve", self.growth_reserve, minimum=1)
        check_stop_after(self.stop_after)
        _check_cap(self.prefill_cap, self.budget_of)
        for name in ("mode", "options"):
            if getattr(self, name) is not None and self.lowering != "inductor":
                raise ConfigError(f"{name}={getattr(self, name)!r} is for lowering='inductor', not {self.lowering!r}")
        if self.options is not None and not isinstance(self.options, dict):
            raise ConfigError(f"options={self.options!r} must be a dict of Inductor options")

    @functools.cached_property
    def eviction(self) -> EvictionConfig:
        """What the eviction maths needs to know of them."""
        return EvictionConfig(**{name: getattr(self, name) for name in names_of(EvictionConfig)})


def _check_cap(cap: object, budget_of: BudgetOf) -> None:
    if cap is None:
        return
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 1.0 <= cap < math.inf:
        raise ConfigError(f"prefill_cap={cap!r} must be a number >= 1, a multiple of the mean budget, or None")
    if budget_of == "vision":
        raise ConfigError(
            f"prefill_cap={cap!r} needs budget_of='all': with budget_of='vision' the size of the mean budget is known only "
            "from the prompt's data"
        )


OPTION_NAMES = names_of(BackendOptions)


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
    return BackendOptions(**given)


Taken = ParamSpec("Taken")
Made = TypeVar("Made")


def takes(record: Callable[Taken, BackendOptions]) -> Callable[[Callable[..., Made]], Callable[Taken, Made]]:
    """Gives a function of `**options` the signature of their record: for type checkers, editors, `help()` and notebooks."""
    first, *others = inspect.signature(record).parameters.values()
    signature = inspect.Signature([first, *(other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others)])

    def give(function: Callable[..., Made]) -> Callable[Taken, Made]:
        @functools.wraps(function)
        def named(*args: Taken.args, **options: Taken.kwargs) -> Made:
            if len(args) > 1:
                raise TypeError(f"{function.__name__}() takes one argument by position, {first.name}; give the others by name")
            return function(**dict(zip((first.name,), args, strict=False)), **options)

        named.__signature__ = signature  # type: ignore[attr-defined]
        return named

    return give
