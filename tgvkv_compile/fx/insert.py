"""Insertion of calls to plain torch functions, with fresh metadata.

A call node's target may be any traceable Python function: AOTAutograd and `torch.export` trace through it. So the
maths is written once, in `ops/`, and the inserted graph reads like it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.meta import described, fake_value, set_fake_value
from tgvkv_compile.private import FakeTensor


def insert_call(gm: GraphModule, function: Callable[..., Any], *args: Any, name: str, **kwargs: Any) -> Node:
    """Inserts `name = function(*args, **kwargs)` at the graph's current insert point.

    Raises:
        InternalError: An argument carries no metadata, so the new node's cannot be computed.
    """
    map_aggregate((args, kwargs), _check_constant)
    node = gm.graph.call_function(function, args, kwargs)
    node.name = name
    propagate(node, alike=True)
    return node


def _check_constant(argument: Any) -> Any:
    if isinstance(argument, torch.SymInt):
        raise InternalError(f"a symbolic size ({argument}) was given as a constant; give a tensor that has it")
    return argument


def propagate(node: Node, *, alike: bool = False) -> None:
    """Computes and records the fake value of a call node from those of its arguments.

    Args:
        node: The call.
        alike: Take the value of a call of the same function on arguments that are alike, where there was one: what this
            package inserts comes once per layer.
    """

    def lookup(argument: Node) -> Any:
        value = fake_value(argument)
        if value is None:
            raise InternalError(f"%{node.name} uses %{argument.name}, which carries no fake value")
        return value

    args = map_arg(node.args, lookup)
    kwargs = map_arg(node.kwargs, lookup)
    known = _known(args) if alike else {}
    key = (node.target, described(args), described(kwargs))
    if key in known:
        set_fake_value(node, known[key])
        return
    with torch.no_grad():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    set_fake_value(node, value)
    known[key] = value


def _known(args: Any) -> dict[object, Any]:
    """The values of calls so far, empty where no argument says whose values they are.

    They are kept by the mode that the arguments belong to: symbols of two modes are different things of the same name.
    """
    for argument in args:
        found = argument[0] if isinstance(argument, tuple) and argument else argument
        if isinstance(found, FakeTensor):
            known: dict[object, Any] = vars(found.fake_mode).setdefault("_tgvkv_known", {})
            return known
    return {}


def insert_item(gm: GraphModule, node: Node, place: int | str, *, name: str) -> Node:
    """Inserts `name = node[place]`, for functions that return tuples; of a `NamedTuple` the place is a field's name.

    Raises:
        InternalError: It has no such field.
    """
    if isinstance(place, str):
        fields: tuple[str, ...] = getattr(fake_value(node), "_fields", ())
        if place not in fields:
            raise InternalError(f"%{node.name} has no field {place!r}; it has {fields}")
        place = fields.index(place)
    return insert_call(gm, operator.getitem, node, place, name=name)


def insert_placeholder(gm: GraphModule, name: str, value: Any) -> Node:
    """Appends a graph input after the existing ones."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd asks every input of a dynamo graph for its source
    set_fake_value(node, value)
    return node
