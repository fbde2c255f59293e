"""Records of what an inserter added, for the inserters after it; `Rewrite.leave` keeps them."""

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Scores:
    """From `insert_scoring`: `roles`, `valid` (None where nothing is padded), and per layer `mass`, `score` and `tier`."""

    roles: Node
    valid: Node | None
    mass: tuple[Node, ...]
    score: tuple[Node, ...]
    tier: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class LayerCandidates:
    """What eviction chooses from in one layer: `key`, `value`, `score`, `tier` and `roles`."""

    key: Node
    value: Node
    score: Node
    tier: Node
    roles: Node


@dataclasses.dataclass(frozen=True)
class CappedLayers:
    """From `insert_capping`: what is left of each layer."""

    layers: tuple[LayerCandidates, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """From `insert_survivors` or `insert_whole_past`: what a turn with new vision chooses from.

    Attributes:
        new: `Roles` of the new tokens.
        roles: `Roles` of each layer's candidates: its survivors, then the new tokens.
        history: b8[B, P], which positions before this turn are vision.
        keep_rate: f32[B, L], before this turn.
        pasts: The inputs that held the past, which nothing reads once attention is normalised.
    """

    new: Node
    roles: tuple[Node, ...]
    history: Node
    keep_rate: Node
    pasts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Budgets:
    """From `insert_budgeting`: the `Allocation` node."""

    allocation: Node
