"""Cuts a rewritten graph where each layer's attention begins, and tells which of the pieces are alike.

Inductor's time grows with the graph, and decoder layers are alike: what stands between the attention of one layer and that of
the next is the same operations on other weights. One of each kind is lowered and called for all.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import BEGINS, described, fake_value, set_fake_value
from tgvkv_compile.ops.attention.layout import in_order
from tgvkv_compile.private import free_symbols, symbol_is_unbacked

_LAYER = "layer"
"""Keyword of this package's functions that says which layer they are for."""

Path = tuple[int, ...]
"""Where in a node's value, a tree of tuples, a leaf is."""
Leaf = tuple[Node, Path]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a graph.

    Attributes:
        nodes: In order.
        taken: Nodes outside that it uses, in order of first use.
        given: Nodes of its own that are used outside.
        layers: The layers that its nodes name, in order of first use.
        key: Equal for pieces that compute the same of inputs that are alike.
    """

    nodes: tuple[Node, ...]
    taken: tuple[Node, ...]
    given: tuple[Node, ...]
    layers: tuple[int, ...]
    key: object


def cut(gm: GraphModule) -> list[Piece] | None:
    """The pieces of a graph, in order, or None where nothing is won by it: no two are alike, or they cannot be told apart.

    A node that has `BEGINS` in its metadata begins a piece.
    """
    groups: list[list[Node]] = [[]]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if BEGINS in node.meta and groups[-1]:
            groups.append([])
        groups[-1].append(node)
    pieces = [_piece(gm, group) for group in groups]
    alike = len({piece.key for piece in pieces}) < len(pieces)
    return pieces if alike and all(_crosses(node) for piece in pieces for node in piece.taken) else None


def _crosses(node: Node) -> bool:
    """Whether a value can be handed from piece to piece: a size that is only known when it was computed cannot."""
    value = fake_value(node)
    return not any(symbol_is_unbacked(symbol) for symbol in symbols_of(value)) and not _holds(value, _UNTOLD)


_UNTOLD = (torch.SymBool, torch.SymFloat)


def _holds(value: Any, kinds: tuple[type, ...]) -> bool:
    return any(_holds(part, kinds) for part in value) if isinstance(value, (tuple, list)) else isinstance(value, kinds)


def _piece(gm: GraphModule, nodes: list[Node]) -> Piece:
    own = {node: index for index, node in enumerate(nodes)}
    given = tuple(node for node in nodes if any(user not in own for user in node.users))
    describe = _Describer(gm, own)
    key = (*(describe.node(node) for node in nodes), tuple(own[node] for node in given))
    return Piece(tuple(nodes), tuple(describe.taken), given, tuple(describe.layers), key)


class _Describer:
    """Describes the nodes of a piece by values that are equal for a piece that is alike."""

    def __init__(self, gm: GraphModule, own: dict[Node, int]) -> None:
        self._gm, self._own = gm, own
        self.taken: dict[Node, int] = {}
        self.layers: dict[int, int] = {}

    def node(self, node: Node) -> object:
        """What it does, to what."""
        kwargs = dict(node.kwargs)
        layer = layer_of(node)
        if layer is not None:
            kwargs[_LAYER] = f"layer {self.layers.setdefault(layer, len(self.layers))}"
        target = node.target
        if node.op == "get_attr":
            target = self._attribute(str(target))
        return node.op, target, self._argument(node.args), self._argument(kwargs)

    def _attribute(self, name: str) -> str:
        value: Any = self._gm
        for part in name.split("."):
            value = getattr(value, part)
        # Graphs may hold tensors of their own; only those without any are told by their code.
        bare = isinstance(value, GraphModule) and not value.graph.find_nodes(op="get_attr")
        return value.code if bare else f"attribute {id(value)}"

    def _argument(self, argument: Any) -> object:
        if isinstance(argument, Node):
            if argument in self._own:
                return "own", self._own[argument]
            if argument not in self.taken:
                self.taken[argument] = len(self.taken)
            return "taken", self.taken[argument], described(fake_value(argument))
        if isinstance(argument, slice):
            return slice, tuple(self._argument(part) for part in (argument.start, argument.stop, argument.step))
        if isinstance(argument, (tuple, list)):
            return type(argument), tuple(self._argument(part) for part in argument)
        if isinstance(argument, dict):
            return tuple((name, self._argument(part)) for name, part in argument.items())
        return type(argument), repr(argument)


def layer_of(node: Node) -> int | None:
    """The layer that a call of one of this package's functions names."""
    ours = str(getattr(node.target, "__module__", "")).startswith("tgvkv_compile.")
    layer = node.kwargs.get(_LAYER) if ours else None
    return layer if isinstance(layer, int) else None


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors and symbolic sizes in a node's value."""
    if isinstance(value, (Tensor, SymInt)):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))


def symbols_of(value: Any) -> set[Any]:
    """The free symbols of the sizes in a node's value."""
    return {symbol for _, leaf in leaves(value) for symbol in free_symbols(leaf)}


@dataclasses.dataclass(frozen=True)
class PieceModule:
    """A piece as a graph of its own.

    Attributes:
        gm: Flat inputs to a flat tuple of outputs.
        inputs: Their fake values.
        taken: What each input is; an int: the place in `Piece.layers` of the layer that it is.
        given: What each output is.
    """

    gm: GraphModule
    inputs: list[Any]
    taken: list[Leaf | int]
    given: list[Leaf]


def module_of(alike: Sequence[Piece], root: GraphModule, environment: Environment) -> PieceModule:
    """Makes a graph of the last of some pieces that are alike.

    Args:
        alike: From `cut`. Of several, the layers that they name are inputs; of one, they are constants.
        root: The graph that they are of.
        environment: Of its fake values.
    """
    piece = alike[-1]
    graph = Graph()
    inputs: list[Any] = []
    taken: list[Leaf | int] = []

    def placeholder(name: str, value: Any, what: Leaf | int) -> Node:
        node = graph.placeholder(name)
        set_fake_value(node, value)
        inputs.append(value)
        taken.append(what)
        return node

    found = {node: [(path, value) for path, value in leaves(fake_value(node))] for node in piece.taken}
    inside = {
        (node, path): placeholder("_".join((node.name, *map(str, path))), value, (node, path))
        for node, parts in found.items()
        for path, value in parts
    }
    for node in _bringing(root, piece, inputs):
        placeholder(node.name, fake_value(node), (node, ()))
    numbers: dict[int | None, Node] = {}
    for place, layer in enumerate(piece.layers if len(alike) > 1 else ()):
        symbol = environment.number(f"tgvkv_layer_{place}", [other.layers[place] for other in alike])
        numbers[layer] = placeholder(f"tgvkv_layer_{place}", symbol, place)
    mapped = {node: _rebuilt(graph, node, inside) for node in piece.taken}
    for node in piece.nodes:
        copied = mapped[node] = graph.node_copy(node, lambda argument: mapped[argument])
        number = numbers.get(layer_of(node))
        if number is not None:
            copied.kwargs = {**copied.kwargs, _LAYER: number}
    given = [(node, path) for node in piece.given for path, _ in leaves(fake_value(node))]
    graph.output(tuple(_laid_out(graph, _item(graph, mapped[node], path), _value(node, path)) for node, path in given))
    return PieceModule(GraphModule(root, graph), inputs, taken, given)


def _bringing(root: GraphModule, piece: Piece, inputs: list[Any]) -> list[Node]:
    """Inputs of the whole graph to hand on because the piece computes with sizes that none of its own inputs has."""
    needed = {symbol for node in (*piece.nodes, *piece.taken) for symbol in symbols_of(fake_value(node))}
    needed -= _plain_symbols(inputs)
    brought = []
    for node in root.graph.find_nodes(op="placeholder"):
        has = needed & _plain_symbols([fake_value(node)])
        if has:
            brought.append(node)
            needed -= has
    return brought


def _plain_symbols(values: list[Any]) -> set[Any]:
    """Symbols that are the whole of a size."""
    sizes: list[Any] = []
    for value in values:
        sizes += value.shape if isinstance(value, Tensor) else [value]
    return {size.node.expr for size in sizes if isinstance(size, SymInt) and size.node.expr.is_Symbol}


def _rebuilt(graph: Graph, node: Node, inside: dict[Leaf, Node]) -> Any:
    """The node's value as what stands for it among the inputs."""

    def build(value: Any, path: Path) -> Any:
        if (node, path) in inside:
            return inside[node, path]
        if isinstance(value, (tuple, list)):
            parts = [build(part, (*path, index)) for index, part in enumerate(value)]
            make: Callable[..., Any] = getattr(type(value), "_make", list if isinstance(value, list) else tuple)
            return make(parts)
        return value

    return build(fake_value(node), ())


def _item(graph: Graph, node: Node, path: Path) -> Node:
    for index in path:
        node = graph.call_function(operator.getitem, (node, index))
    return node


def _value(node: Node, path: Path) -> Any:
    value = fake_value(node)
    for index in path:
        value = value[index]
    return value


def _laid_out(graph: Graph, node: Node, value: Any) -> Node:
    """Makes sure of the memory layout that the next piece is compiled for.

    What Inductor decomposes may come out in another: the `cat` of a first append in that of its one full part.
    """
    if not isinstance(value, Tensor) or value.ndim < 2 or _overlaps(value):
        return node
    strides = _hints(value.stride())
    order = tuple(sorted(range(value.ndim), key=lambda dim: -strides[dim]))
    return graph.call_function(in_order, (node, order))


def _overlaps(value: Tensor) -> bool:
    """Whether a tensor's elements are not dense in memory: a part of another, or one that is expanded."""
    sizes, strides = _hints(value.shape), _hints(value.stride())
    expected = 1
    for dim in sorted(range(value.ndim), key=lambda dim: (strides[dim], sizes[dim])):
        if sizes[dim] != 1 and strides[dim] != expected:
            return True
        expected *= sizes[dim]
    return False


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [int(size.node.hint) if isinstance(size, SymInt) else int(size) for size in sizes]
