"""Lowers a graph piece by piece: pieces that are alike are compiled once."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.lower.chain import Chain, Link
from tgvkv_compile.lower.pieces import Leaf, Piece, PieceModule, module_of

log = logging.getLogger("tgvkv_compile")

Compile = Callable[[GraphModule, list[Any]], Callable[..., Sequence[Any]]]


def lower_by_piece(gm: GraphModule, pieces: Sequence[Piece], environment: Environment, compile_piece: Compile) -> Chain:
    """Compiles one piece of each kind.

    Args:
        gm: The graph.
        pieces: Its pieces, from `cut`.
        environment: Of its fake values.
        compile_piece: From a graph and its fake inputs to a callable.
    """
    alike: dict[object, list[Piece]] = {}
    for piece in pieces:
        alike.setdefault(piece.key, []).append(piece)
    log.debug("%d pieces of %d kinds", len(pieces), len(alike))
    kinds = {}
    for key, of_kind in alike.items():
        module = module_of(of_kind, gm, environment)
        kinds[key] = _Kind(of_kind[-1], module, compile_piece(module.gm, module.inputs))
    return _chained(gm, pieces, kinds)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A piece that was compiled, for all that are alike."""

    piece: Piece
    module: PieceModule
    run: Callable[..., Sequence[Any]]


def _chained(gm: GraphModule, pieces: Sequence[Piece], kinds: dict[object, _Kind]) -> Chain:
    inputs = gm.graph.find_nodes(op="placeholder")
    layers = sorted({layer for piece in pieces for layer in piece.layers})
    places: dict[Leaf | int, int] = {(node, ()): place for place, node in enumerate(inputs)}
    places.update({layer: len(inputs) + place for place, layer in enumerate(layers)})
    calls = []
    for piece in pieces:
        kind = kinds[piece.key]
        own = _correspondence(kind.piece, piece)
        taken = tuple(
            places[piece.layers[what] if isinstance(what, int) else (own.get(what[0], what[0]), what[1])]
            for what in kind.module.taken
        )
        given = []
        for node, path in kind.module.given:
            places[own[node], path] = len(places)
            given.append(places[own[node], path])
        calls.append((kind.run, taken, tuple(given)))
    outputs = [places[node, ()] if isinstance(node, Node) else None for node in output_nodes(gm)]
    return Chain(_links(calls, set(outputs)), len(inputs), layers, len(places), outputs)


def _correspondence(model: Piece, piece: Piece) -> dict[Node, Node]:
    """From the nodes of the piece that was compiled to those of one that is alike."""
    pairs = zip((*model.nodes, *model.taken), (*piece.nodes, *piece.taken), strict=True)
    return dict(pairs)


def _links(calls: Sequence[tuple[Any, tuple[int, ...], tuple[int, ...]]], kept: set[int | None]) -> list[Link]:
    read = {place: index for index, (_, taken, _) in enumerate(calls) for place in taken}
    links = []
    for index, (run, taken, given) in enumerate(calls):
        over = {place for place in (*taken, *given) if place not in kept and read.get(place, -1) <= index}
        links.append(Link(run, taken, given, tuple(sorted(over))))
    return links
