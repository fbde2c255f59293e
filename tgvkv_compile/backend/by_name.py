"""The backend by name: `torch.compile(model, backend="tgvkv", options={"budget": 0.05})`.

Dynamo looks the name up when `torch.compile` is called; that lookup is the choice of this backend, and the only moment
before tracing at which dynamo's flags can be set. So they are set when the attribute `tgvkv` is asked for.
"""

import functools
from typing import Any

from torch.fx import GraphModule

from tgvkv_compile.backend import dynamo
from tgvkv_compile.backend.backend import TgvkvBackend, tgvkv_backend
from tgvkv_compile.backend.options import OPTION_NAMES
from tgvkv_compile.config import check_names
from tgvkv_compile.errors import ConfigError


@functools.cache
def _backend(options: tuple[tuple[str, Any], ...]) -> TgvkvBackend:
    return tgvkv_backend(**dict(options))


def _by_name(
    gm: GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Called by dynamo with each graph.

    Args:
        gm: From dynamo.
        example_inputs: From dynamo.
        mode: `torch.compile(mode=...)`.
        options: `torch.compile(options=...)`: the keyword arguments of `tgvkv_backend`; Inductor's own under `"options"`.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    return _resolve(mode=mode, options=options)(gm, example_inputs)


def _resolve(*, mode: str | None = None, options: dict[str, Any] | None = None) -> TgvkvBackend:
    """The backend with these arguments of `torch.compile`; the same for the same."""
    given = dict(options or {})
    if mode is not None and mode != "default":
        given["mode"] = mode
    check_names(given, OPTION_NAMES, where="backend 'tgvkv'")
    if given.get("configure_dynamo", True) is not True:
        raise ConfigError(
            "configure_dynamo=False cannot be honoured by name (dynamo's flags are set when the name is looked up); pass "
            "backend=tgvkv_backend(..., configure_dynamo=False)"
        )
    if isinstance(given.get("options"), dict):
        given["options"] = _Frozen(given["options"])
    return _backend(tuple(sorted(given.items())))


_by_name.takes_handles = True  # type: ignore[attr-defined]  # see `runtime.tracing`
_by_name.resolve = _resolve  # type: ignore[attr-defined]  # see `backend.cut`


class _Frozen(dict[str, Any]):
    """A dict that can be part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


def __getattr__(name: str) -> Any:
    if name == "tgvkv":
        dynamo.configure()
        return _by_name
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
