"""One trace for many backends: tests that differ in options only need not wait for dynamo each time."""

from collections.abc import Callable
from typing import Any


class Sharing:
    """Takes a backend's place and has each graph compiled by whichever backend is asked, when it is first asked.

    Tracing is most of what compiling costs, and dynamo knows nothing of budgets, rankings and lowerings: these begin behind it.
    What tests count by backend stays what it was.

    Args:
        model: To be compiled in place.
        backend: Whose cut the graphs come from, and the first to be asked.

    Attributes:
        asked: Whose turn it is; to be left alone while a cache is in use.
    """

    def __init__(self, model: Any, backend: Any) -> None:
        self.model, self.asked = model, backend
        backend.cut._backend = self
        model.compile(backend=backend)

    def __call__(self, gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        compiled = {self.asked: self.asked(gm, inputs)}

        def answered(*given: Any) -> Any:
            if self.asked not in compiled:
                compiled[self.asked] = self.asked(gm, inputs)
            return compiled[self.asked](*given)

        return answered
