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
from tgvkv_compile.fx.meta import fake_value, set_fake_value


def insert_call(gm: GraphModule, function: Callable[..., Any], *args: Any, name: str, **kwargs: Any) -> Node:
    """Inserts `name = function(*args, **kwargs)` at the graph's current insert point.

    Raises:
        InternalError: An argument carries no metadata, so the new node's cannot be computed.
    """
    map_aggregate((args, kwargs), _check_constant)
    node = gm.graph.call_function(function, args, kwargs)
    node.name = name
    propagate(node)
    return node


def _check_constant(argument: Any) -> Any:
    if isinstance(argument, torch.SymInt):
        raise InternalError(f"a symbolic size ({argument}) was given as a constant; give a tensor that has it")
    return argument


def propagate(node: Node) -> None:
    """Computes and records the fake value of a call node from those of its arguments."""

    def lookup(argument: Node) -> Any:
        value = fake_value(argument)
        if value is None:
            raise InternalError(f"%{node.name} uses %{argument.name}, which carries no fake value")
        return value

    args = map_arg(node.args, lookup)
    kwargs = map_arg(node.kwargs, lookup)
    with torch.no_grad():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    set_fake_value(node, value)


def insert_item(gm: GraphModule, node: Node, index: int, *, name: str) -> Node:
    """Inserts `name = node[index]`, for functions that return tuples."""
    return insert_call(gm, operator.getitem, node, index, name=name)


def insert_placeholder(gm: GraphModule, name: str, value: Any) -> Node:
    """Appends a graph input after the existing ones."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node._dynamo_source = None  # AOTAutograd asks every input of a dynamo graph for its source
    set_fake_value(node, value)
    return node
