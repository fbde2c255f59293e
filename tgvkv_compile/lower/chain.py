"""Pieces of a graph, compiled, one after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Link:
    """One call of a compiled piece. Values stand in numbered places.

    Attributes:
        run: The compiled piece, flat inputs to a flat sequence of outputs.
        taken: Places of its inputs.
        given: Places of its outputs.
        over: Places that nothing behind it reads.
    """

    run: Callable[..., Sequence[Any]]
    taken: tuple[int, ...]
    given: tuple[int, ...]
    over: tuple[int, ...]


class Chain:
    """Runs links in order; what no later link needs is let go at once, as in one graph.

    Args:
        links: In order.
        inputs: How many inputs there are: they have the first places.
        constants: What stands in the places behind them from the start.
        places: How many there are in all.
        outputs: Places of the outputs; None for an output that is None.
    """

    def __init__(
        self, links: Sequence[Link], inputs: int, constants: Sequence[Any], places: int, outputs: Sequence[int | None]
    ) -> None:
        self._links, self._outputs = tuple(links), tuple(outputs)
        self._behind = [*constants, *[None] * (places - inputs - len(constants))]

    def __call__(self, *inputs: Any) -> list[Any]:
        """What the whole graph gives."""
        values = [*inputs, *self._behind]
        for link in self._links:
            results = link.run(*[values[place] for place in link.taken])
            for place, result in zip(link.given, results, strict=True):
                values[place] = result
            for place in link.over:
                values[place] = None
        return [None if place is None else values[place] for place in self._outputs]
