"""One name per operation, whichever way a graph spells it.

Dynamo writes torch functions and tensor methods; `torch.export` writes aten overloads. Passes ask for the *kind* of a
node and never compare targets themselves.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tgvkv_compile.ops.merged import SPELLINGS

aten = torch.ops.aten

_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.nn.functional.scaled_dot_product_attention: "sdpa",
    torch.nn.functional.embedding: "embedding",
    torch.ops.higher_order.flex_attention: "flex",
    torch.nn.functional.softmax: "softmax",
    torch.nn.functional.dropout: "dropout",
    torch.softmax: "softmax",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    operator.matmul: "matmul",
    operator.mul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.getitem: "getitem",
    torch.tensor: "tensor",
    torch.transpose: "transpose",
    torch.repeat_interleave: "repeat_interleave",
    torch.masked_scatter: "masked_scatter",
    torch.where: "where",
    torch.eq: "eq",
    operator.eq: "eq",
    torch.nn.functional.linear: "linear",
    aten.linear.default: "linear",
    aten.addmm.default: "addmm",
    aten.scaled_dot_product_attention.default: "sdpa",
    aten.embedding.default: "embedding",
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
    aten.dropout.default: "dropout",
    aten.cat.default: "cat",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.add.Tensor: "add",
    aten.masked_scatter.default: "masked_scatter",
    aten.where.self: "where",
    aten.eq.Scalar: "eq",
    aten.eq.Tensor: "eq",
    aten.transpose.int: "transpose",
    aten.expand.default: "expand",
    aten.view.default: "reshape",
    aten._unsafe_view.default: "reshape",
    aten.reshape.default: "reshape",
    aten.unsqueeze.default: "unsqueeze",
    aten.clone.default: "contiguous",
    aten.contiguous.default: "contiguous",
    aten._to_copy.default: "to",
    aten.to.dtype: "to",
    aten.to.dtype_layout: "to",
    aten.index_copy.default: "index_copy",
    aten.index_copy_.default: "index_copy",
    aten.slice.Tensor: "getitem",
    aten._assert_tensor_metadata.default: "assertion",
    **dict.fromkeys(SPELLINGS, "merged"),
}

_METHODS = {
    "view": "reshape",
    "reshape": "reshape",
    "masked_scatter": "masked_scatter",
    "masked_scatter_": "masked_scatter",
    "index_copy": "index_copy",
    "index_copy_": "index_copy",
    "contiguous": "contiguous",
    "clone": "contiguous",
    "type_as": "to",
    "float": "to",
    "softmax": "softmax",
    "matmul": "matmul",
    "mul": "mul",
    "add": "add",
}


def op_kind(node: Node) -> str:
    """The kind of operation a node does: `"sdpa"`, `"cat"`, ..., its own name where none is known.

    Placeholders, outputs and attributes give their opcode (`"placeholder"`, `"output"`, `"get_attr"`).
    """
    if node.op == "call_function":
        known = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
        return known if known is not None else str(getattr(node.target, "__name__", node.target))
    if node.op == "call_method":
        return _METHODS.get(str(node.target), str(node.target))
    return node.op


def collective(node: Node) -> str | None:
    """Which functional collective a node calls (`"all_reduce"`, ...), or None.

    By name: a torch built without `torch.distributed` has no such operators to compare with.
    """
    namespace, _, name = str(node.target).partition(".")
    if node.op != "call_function" or namespace not in ("_c10d_functional", "_c10d_functional_autograd"):
        return None
    name = name.partition(".")[0]
    return None if name == "wait_tensor" else name


def target_name(node: Node) -> str:
    """How a message names what the node calls."""
    return str(getattr(node.target, "__name__", node.target))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """The argument `name` of a node, whether it was given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
