"""What a pass is given: one graph on its way through the passes, and what the passes before left for it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.plan import GraphPlan

Record = TypeVar("Record")


@dataclasses.dataclass
class Rewrite:
    """One graph on its way through the passes.

    Besides the fields it holds frozen records, at most one of each class: what whoever begins gives (the classes below), and
    what inserters leave for those after them (`passes.inserted`).

    Attributes:
        gm: The graph, changed in place.
        environment: The shape environment its metadata lives in.
        plan: What is being done; a pass that changes sites puts a plan with the new ones here.
        config: The eviction options.
    """

    gm: GraphModule
    environment: Environment
    plan: GraphPlan
    config: EvictionConfig
    _records: dict[type, object] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def leave(self, record: object) -> None:
        """Keeps a record for the passes that follow."""
        self._records[type(record)] = record

    def has(self, kind: type) -> bool:
        """Whether there is a record of this class."""
        return kind in self._records

    def get(self, kind: type[Record]) -> Record:
        """The record of this class.

        Raises:
            InternalError: Nobody left one.
        """
        record = self._records.get(kind)
        if not isinstance(record, kind):
            left = ", ".join(sorted(other.__name__ for other in self._records)) or "nothing"
            raise InternalError(f"no pass left a {kind.__name__} of this {self.plan.kind} graph; there is {left}")
        return record

    def pending(self) -> frozenset[Node]:
        """Nodes that need no user yet, because a later pass may use them."""
        of_sites = [node for site in self.plan.sites for node in (site.lse, site.mask) if node is not None]
        return frozenset((*of_sites, *_nodes(tuple(self._records.values()))))


def _nodes(value: Any) -> Iterator[Node]:
    """The nodes in a record, however deep."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _nodes(part)
    elif dataclasses.is_dataclass(value):
        yield from _nodes(tuple(vars(value).values()))


@dataclasses.dataclass(frozen=True)
class ArenaSizes:
    """What a graph from dynamo is rewritten for.

    Attributes:
        slots: T of the example call; 0 where it has no arena.
        reserve: Decode steps that freshly packed segments leave room for.
        prefill_cap: How many candidates a layer may have, as a multiple of the mean budget; None: all its tokens.
    """

    slots: int
    reserve: int
    prefill_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class StaticPrefill:
    """What an exported prefill is rewritten for.

    Attributes:
        capacities: Slots of each layer.
        new_tokens: The decode steps that must find room.
        blocks: How many blocks the rows of attention are walked in.
        question_rows: The most tokens of a question.
        attention_mask: The input int64 `[B, N]`, 0 at padding.
    """

    capacities: tuple[int, ...]
    new_tokens: int
    blocks: int
    question_rows: int
    attention_mask: Node


@dataclasses.dataclass(frozen=True)
class StaticDecode:
    """What an exported decode step is rewritten for.

    Attributes:
        state: Fake values of the cache, by name, in the order in which prefill returns them.
    """

    state: dict[str, Tensor]
