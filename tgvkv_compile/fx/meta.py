"""Metadata of nodes: fake values and source lines, for dynamo graphs and exported graphs alike."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.errors import InternalError
from tgvkv_compile.private import is_traceable_wrapper_subclass

VISION_OF = "tgvkv_vision_of"
"""Key in `Node.meta` of an input that is a mask of vision: the name of the input whose embeddings it is for."""
OF_TOKENS = "tgvkv_of_tokens"
"""Key in `Node.meta` of an input that holds embeddings: it is known which of them are vision, if any."""

BEGINS = "tgvkv_begins"
"""Key in `Node.meta` of a node that begins a part of the graph which comes once per layer; see `lower.pieces`."""


def fake_value(node: Node) -> Any:
    """The fake value of a node: `meta["example_value"]` (dynamo) or `meta["val"]` (export), or None."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def fake_tensor(node: Node) -> torch.Tensor:
    """The fake tensor of a node.

    Raises:
        InternalError: The node carries none.
    """
    value = fake_value(node)
    if not isinstance(value, torch.Tensor):
        raise InternalError(f"node %{node.name} ({node.target}) should hold a tensor, its metadata holds {value!r}")
    return value


def is_tensor(node: object) -> bool:
    """Whether `node` is a node that holds a tensor."""
    return isinstance(node, Node) and isinstance(fake_value(node), torch.Tensor)


def partial_over(value: object) -> str | None:
    """The process group over which a `DTensor` holds partial sums, by name; None where it is anything else.

    It is told by its attributes: importing `torch.distributed.tensor` would cost every user of one process.
    """
    placements, mesh = getattr(value, "placements", ()), getattr(value, "device_mesh", None)
    for dim, placement in enumerate(placements):
        if placement.is_partial() and mesh is not None:
            return str(mesh.get_group(dim).group_name)
    return None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are written alike; unlike `==`, asking adds no guard on a symbolic one."""
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (left, right)]
    return bool(expressions[0] == expressions[1])


def described(value: Any) -> object:
    """What is known of a value while tracing: equal for values that graphs cannot tell apart, and hashable."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(str, value.shape)), tuple(map(str, value.stride()))
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            return *sizes, value.dtype, type(value), repr(context), tuple(described(getattr(value, name)) for name in names)
        return *sizes, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return type(value), tuple(described(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, described(part)) for name, part in value.items())
    return type(value), repr(value)


def submodule(node: Node) -> GraphModule:
    """The graph that a `get_attr` node stands for: an argument of a higher-order operator."""
    value = attribute(node)
    assert isinstance(value, GraphModule), f"%{node.name} holds a {type(value).__name__}"
    return value


def attribute(node: Node) -> Any:
    """What a `get_attr` node stands for."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def set_fake_value(node: Node, value: Any) -> None:
    """Records the fake value under the key that dynamo graphs use."""
    node.meta["example_value"] = value


def output_nodes(gm: GraphModule) -> list[Any]:
    """The graph's outputs as a list, whatever container the graph returns them in."""
    (result,) = gm.graph.output_node().args
    return list(result) if isinstance(result, (tuple, list)) else [result]


def source_line(node: Node) -> str:
    """`file:line, code` of the model code that made the node, innermost frame."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    for position in range(len(lines) - 1, -1, -1):
        if lines[position].startswith("File "):
            where = lines[position].removeprefix("File ").replace('"', "")
            file, _, rest = where.partition(", line ")
            number, _, _ = rest.partition(",")
            code = lines[position + 1] if position + 1 < len(lines) else ""
            return f"{file}:{number}, {code}" if code else f"{file}:{number}"
    return "(source unknown)"
