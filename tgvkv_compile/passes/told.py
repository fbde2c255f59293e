"""What is said of a user's function that a graph cannot call."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tgvkv_compile.config import name_of
from tgvkv_compile.errors import ConfigError, TgvkvError
from tgvkv_compile.fx.private import NoHostReads


@contextlib.contextmanager
def told(option: str, policy: str | Callable[..., Any]) -> Iterator[None]:
    """Says which function could not be traced within; what goes wrong with one of this package is a bug, and stays as it is.

    Args:
        option: Which option it was given as.
        policy: A name, or the function.

    Raises:
        ConfigError: It cannot be traced.
    """
    try:
        with contextlib.nullcontext() if isinstance(policy, str) else NoHostReads():  # type: ignore[no-untyped-call]
            yield
    except TgvkvError:
        raise
    except Exception as error:
        if isinstance(policy, str):
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{option}={name_of(policy)} cannot be traced ({type(error).__name__}: {said}); make it of torch operations on "
            "what it is given, without .item(), `if` on a tensor, or NumPy (docs/policies.md)"
        ) from error
