"""Records of what an inserter added, for the inserters after it."""

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Scores:
    """From `insert_scoring`: `roles`, `valid` (None where nothing is padded), and per layer `mass` and `score`."""

    roles: Node
    valid: Node | None
    mass: tuple[Node, ...]
    score: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Budgets:
    """From `insert_budgeting`: the `Allocation` node."""

    allocation: Node
