"""Records of what an inserter added, for the inserters after it; `Rewrite.leave` keeps them."""

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Scores:
    """From `insert_scoring`: `token_types`, `valid` (None where nothing is padded); per layer `mass`, `score` and `tier`."""

    token_types: Node
    valid: Node | None
    mass: tuple[Node, ...]
    score: tuple[Node, ...]
    tier: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class LayerCandidates:
    """What eviction chooses from in one layer: `key`, `value`, `score`, `tier` and `token_types`."""

    key: Node
    value: Node
    score: Node
    tier: Node
    token_types: Node


@dataclasses.dataclass(frozen=True)
class CappedLayers:
    """From `insert_capping`: what is left of each layer."""

    layers: tuple[LayerCandidates, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """From `insert_survivors` or `insert_whole_past`: what a later turn with new vision chooses from.

    Attributes:
        new: `TokenTypes` of the new tokens.
        token_types: `TokenTypes` of each layer's candidates: its survivors, then the new tokens.
        history: b8[B, P], which positions before this turn are vision.
        keep_rate: f32[B, L], before this turn.
        pasts: The inputs that held the past, which nothing reads once attention is normalised.
    """

    new: Node
    token_types: tuple[Node, ...]
    history: Node
    keep_rate: Node
    pasts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Budgets:
    """From `insert_budgeting`: the `Allocation` node."""

    allocation: Node
