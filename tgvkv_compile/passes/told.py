"""What is said of a user's function that a graph cannot call."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from tgvkv_compile.config import name_of
from tgvkv_compile.errors import ConfigError, TgvkvError
from tgvkv_compile.fx.meta import fake_value
from tgvkv_compile.private import NoHostReads


@contextlib.contextmanager
def told(option: str, policy: str | Callable[..., Any], given: Sequence[Node | None] = ()) -> Iterator[None]:
    """Says which function could not be traced within; what goes wrong with one of this package is a bug, and stays as it is.

    Args:
        option: Which option it was given as.
        policy: A name, or the function.
        given: What it is given and may not write to.

    Raises:
        ConfigError: It cannot be traced, or writes to what it is given.
    """
    if isinstance(policy, str):
        yield
        return
    before = _versions(given)
    try:
        with NoHostReads():  # type: ignore[no-untyped-call]
            yield
    except TgvkvError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{option}={name_of(policy)} cannot be traced ({type(error).__name__}: {said}); make it of torch operations on "
            "what it is given, without .item(), `if` on a tensor, or NumPy (docs/policies.md)"
        ) from error
    if _versions(given) != before:
        raise ConfigError(
            f"{option}={name_of(policy)} writes to its Layer in place, which the model goes on with; use operations "
            "that make new tensors (docs/policies.md)"
        )


def _versions(nodes: Sequence[Node | None]) -> list[int]:
    """How often the tensors of these nodes were written to."""
    values = [fake_value(node) for node in nodes if node is not None]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [part._version for part in parts if isinstance(part, Tensor)]
