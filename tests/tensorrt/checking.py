"""What keeps TensorRT from taking a graph, as far as that can be told without TensorRT.

For exported programs: Torch-TensorRT's converters and what their validators ask for (`converters.json`). For ONNX files: the
operators and types of ONNX-TensorRT's parser (`onnx_operators.json`).
"""

import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import SymInt, Tensor
from torch._decomp import get_decompositions
from torch._export.utils import _collect_all_valid_cia_ops_for_aten_namespace, _get_decomp_for_cia
from torch.fx import Node

aten = torch.ops.aten
FOLDER = Path(__file__).parent
CONVERTERS: dict[str, Any] = json.loads((FOLDER / "converters.json").read_text())
OPERATORS: dict[str, Any] = json.loads((FOLDER / "onnx_operators.json").read_text())
LONGEST_SORT = 3840
_ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_REMOVED = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)  # by its pass `remove_assert_nodes`
_KEPT = tuple(f"aten.{name}.default" for name in _ATTENTION)  # replaced only where `decompose_attention` is set
_CASTS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool)


def problems_of_program(program: torch.export.ExportedProgram) -> list[str]:
    """One line per node that Torch-TensorRT would leave to torch; an engine needs all of them.

    The program is decomposed as Torch-TensorRT does it: torch's decompositions that it enables, all composite operators but
    those that it keeps, and its own replacements, of which only the results matter here: they are made of operators that it
    converts.
    """
    found = []
    for node in program.run_decompositions(decompositions()).graph.nodes:
        if node.op == "call_function" and node.target not in _REMOVED and (problem := _problem(node)) is not None:
            found.append(f"%{node.name} = {_name(node)}: {problem}")
    return found


def decompositions() -> dict[Any, Any]:
    """Torch-TensorRT's table, but for its own replacements."""
    table: dict[Any, Any] = get_decompositions([_operator(name) for name in CONVERTERS["decomposed"] if _operator(name)])
    kept = {_operator(name) for name in CONVERTERS["kept"]} | {aten.scaled_dot_product_attention.default}
    table.update({op: _get_decomp_for_cia(op) for op in _collect_all_valid_cia_ops_for_aten_namespace() if op not in kept})
    return table


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"operator.{target.__name__}" if target.__module__ == "_operator" else f"{target.__module__}.{target.__name__}"


def _problem(node: Node) -> str | None:
    name = _name(node)
    replaced = name in CONVERTERS["replaced"] or name.rpartition(".")[0] in CONVERTERS["replaced"]
    if replaced and name not in _KEPT:
        return None
    if name not in CONVERTERS["converters"]:
        return "no converter"
    for value in _values(node):
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return "float64"
        if isinstance(value, Tensor) and any(_depends_on_data(size) for size in value.shape):
            return "a shape that depends on data"
    entry = CONVERTERS["converters"][name]
    if not entry["dynamic"] and any(_is_dynamic(value) for value in _values(node)):
        return "its converter takes no dynamic shapes"
    for validator in entry["validators"]:
        problem = (
            _VALIDATORS[validator](node) if validator in _VALIDATORS else f"a validator that is not known here: {validator}"
        )
        if problem is not None:
            return problem
    return None


def _values(node: Node) -> Iterator[Any]:
    """What it gives and what it takes."""
    for other in (node, *node.all_input_nodes):
        value = other.meta.get("val")
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, SymInt) or (isinstance(value, Tensor) and any(isinstance(size, SymInt) for size in value.shape))


def _depends_on_data(size: Any) -> bool:
    return isinstance(size, SymInt) and any(str(symbol).startswith("u") for symbol in size.node.expr.free_symbols)


def _tensor(argument: Any) -> Tensor:
    value: Tensor = argument.meta["val"]
    return value


def _sort(node: Node) -> str | None:
    dim: Any = node.args[1] if len(node.args) > 1 else -1
    length = _tensor(node.args[0]).shape[dim]
    return None if isinstance(length, int) and length <= LONGEST_SORT else f"sorts {length} entries, {LONGEST_SORT} at most"


def _topk(node: Node) -> str | None:
    k = node.args[1]
    return None if isinstance(k, int) and k <= LONGEST_SORT else f"k={k} must be a constant, {LONGEST_SORT} at most"


def _to_copy(node: Node) -> str | None:
    dtype = node.kwargs.get("dtype")
    return None if dtype in _CASTS else f"a copy to dtype {dtype}"


def _bools(node: Node) -> str | None:
    tensors = [argument for argument in node.args if isinstance(argument, Node)]
    return None if all(_tensor(argument).dtype == torch.bool for argument in tensors) else "bits of what is not bool"


def _index(node: Node) -> str | None:
    indices: Any = node.args[1]
    given = [_tensor(index).dtype for index in indices if index is not None]
    if torch.bool in given:
        return "a bool index: how many entries it takes depends on data"
    return None if all(dtype in (torch.int32, torch.int64) for dtype in given) else f"indices of dtype {given}"


def _attention(node: Node) -> str | None:
    query, key, value = (_tensor(argument) for argument in node.args[:3])
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    if mask is not None and causal:
        return "a mask together with is_causal"
    if not query.ndim == key.ndim == value.ndim or list(key.shape) != list(value.shape):
        return "keys and values of different shapes"
    grouped = bool(node.kwargs.get("enable_gqa", False))
    same = [dim for dim in range(query.ndim) if dim != query.ndim - 2 and not (grouped and dim == 1)]
    return None if all(query.shape[dim] == key.shape[dim] for dim in same) else "queries and keys of different shapes"


def _efficient_attention(node: Node) -> str | None:
    return "log-sum-exp of the efficient attention" if len(node.args) > 4 and node.args[4] else _attention_mask(node, 6)


def _attention_mask(node: Node, causal: int) -> str | None:
    both = len(node.args) > causal and node.args[causal] and node.args[3] is not None
    return "a mask together with is_causal" if both else None


def _cat(node: Node) -> str | None:
    tensors: Any = node.args[0]
    ranks = {_tensor(argument).ndim for argument in tensors}
    return None if len(ranks) == 1 else f"tensors of ranks {sorted(ranks)}"


def _one_user(node: Node) -> str | None:
    users = list(node.users)
    alone = len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0
    return None if alone else "more than its first output is used"


def _static_sizes(node: Node) -> str | None:
    return None if not any(isinstance(value, Node) for value in _flat(node.args[1])) else "sizes that are not constant"


def _flat(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, (list, tuple)) else [argument]


def _nothing(_: Node) -> None:
    return None


# A validator of Torch-TensorRT, by its name there, as far as graphs of ours can meet it. `lambda` stands for those of `index`,
# `index_put` and `clone`.
_VALIDATORS: dict[str, Callable[[Node], str | None]] = {
    "sort_validator": _sort,
    "topk_validator": _topk,
    "to_copy_dtype_validator": _to_copy,
    "bitwise_type_validator": _bools,
    "bitwise_not_type_validator": _bools,
    "scaled_dot_product_attention_validator": _attention,
    "scaled_dot_product_efficient_attention_validator": _efficient_attention,
    "cat_validator": _cat,
    "one_user_validator": _one_user,
    "has_static_shapes_in_args": _static_sizes,
    "lambda": lambda node: _index(node) if "index" in _name(node) else None,
    "is_only_operator_on_placeholder": _nothing,  # the other of the two converters of `clone`
    "_index_put_accumulate_validator": _nothing,  # the other of the two converters of `index_put`
    "cumsum_validator": _nothing,  # TensorRT-RTX alone refuses it
    "convolution_capability_validator": _nothing,  # TensorRT-RTX alone refuses some
    "getitem_validator": _nothing,  # its parent is checked
}


def problems_of_onnx(model: onnx.ModelProto) -> list[str]:
    """One line per node that ONNX-TensorRT's parser would not take, or that gives a shape that depends on data."""
    found = []
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            found.append(f"operators of the domain {opset.domain!r}")
        elif not OPERATORS["opset"]["least"] <= opset.version <= OPERATORS["opset"]["most"]:
            found.append(f"opset {opset.version}: the parser takes {OPERATORS['opset']}")
    found += [f"the function {function.name!r}" for function in model.functions]
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types.update({name: tensor.data_type for name, tensor in constants.items()})
    for node in graph.node:
        problem = _onnx_problem(node, types, constants)
        if problem is not None:
            found.append(f"{node.name} = {node.op_type}: {problem}")
    return found


_AXES = frozenset({"Squeeze", "Unsqueeze"})


def _onnx_problem(node: Any, types: dict[str, int], constants: dict[str, Any]) -> str | None:
    if node.op_type not in OPERATORS["operators"]:
        return "not supported"
    if node.op_type in ("NonZero", "NonMaxSuppression", "Unique", "Compress"):
        return "a shape that depends on data"
    allowed = OPERATORS["operators"][node.op_type]["types"]
    # Shapes, indices and axes are integers beside the data; the data's type is the result's, or the first input's.
    for name in (node.output[0], _data_of(node)):
        kind = onnx.TensorProto.DataType.Name(types.get(name, 0))
        if kind == "UNDEFINED":
            return f"the type of {name} is not known"
        if kind not in allowed and not (kind == "BOOL" and name == node.output[0] and node.op_type in _COMPARE):
            return f"{kind}, the parser takes {', '.join(allowed)}"
    if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1] and node.input[1] not in constants:
        return "its axes are not an initializer"
    if (node.op_type in _AXES or node.op_type == "CumSum") and len(node.input) > 1 and node.input[1] not in constants:
        return "its axes are not constant"
    if node.op_type == "TopK":
        k = constants.get(node.input[1])
        if k is None or int(onnx.numpy_helper.to_array(k).reshape(-1)[0]) >= LONGEST_SORT:
            return f"K must be a constant less than {LONGEST_SORT}"
    return None


_COMPARE = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"})


def _data_of(node: Any) -> str:
    place = {"Where": 1, "Range": 0}.get(node.op_type, 0)
    return str(node.input[place]) if node.input else str(node.output[0])
