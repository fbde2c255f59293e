"""The checks themselves: each refusal on a graph that is made for it, and graphs that pass."""

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tests.tensorrt.checking import CONVERTERS, OPERATORS, problems_of_onnx, problems_of_program

FLOATS = torch.rand(2, 40)


def _program(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> torch.export.ExportedProgram:
    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    length = torch.export.Dim("length", min=4, max=4000)
    shapes = (tuple({1: length} for _ in inputs),) if dynamic else None
    return torch.export.export(Module(), inputs, dynamic_shapes=shapes)


def _efficient(query: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, query, query, None, True)[0]


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], bool, str]] = {
    "argsort": (lambda x: x.argsort(1), (torch.rand(2, 4000),), False, "sorts 4000"),
    "sort of a dynamic length": (lambda x: x.sort(1).values, (FLOATS,), True, "sorts "),
    "topk": (lambda x: x.topk(3900).values, (torch.rand(2, 5000),), False, "k=3900"),
    "searchsorted": (torch.searchsorted, (FLOATS, FLOATS), False, "no converter"),
    "kthvalue": (lambda x: x.kthvalue(3).values, (FLOATS,), False, "no converter"),
    "nonzero": (lambda x: (x > 0.5).nonzero(), (FLOATS,), False, "depends on data"),
    "bool index": (lambda x: x[x > 0.5], (FLOATS,), False, "depends on data"),
    "gather of a dynamic length": (lambda x, y: x.gather(1, y.long()), (FLOATS, FLOATS), True, "takes no dynamic shapes"),
    "bits": (lambda x: x.long() & 3, (FLOATS,), False, "bits of what is not bool"),
    "float64": (lambda x: x.double() + 1, (FLOATS,), False, "float64"),
    "ranks": (lambda x: torch.cat([torch.zeros(0), x[None]], 1), (FLOATS,), False, "ranks"),
    "a mask and is_causal": (
        lambda q, m: torch.nn.functional.scaled_dot_product_attention(q, q, q, m, is_causal=True),
        (torch.rand(1, 2, 8, 4), torch.ones(8, 8, dtype=torch.bool)),
        False,
        "a mask together with is_causal",
    ),
    "log-sum-exp": (_efficient, (torch.rand(1, 2, 8, 4),), False, "log-sum-exp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_programs(name: str) -> None:
    function, inputs, dynamic, message = REFUSED[name]
    if name in (
        "a mask and is_causal",
        "log-sum-exp",
    ):  # torch itself refuses to trace them on the CPU: the node is made by hand
        program = _program(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), inputs[0])
        (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
        query = node.args[0]
        if name == "log-sum-exp":
            node.target = torch.ops.aten._scaled_dot_product_efficient_attention.default
            node.args = (query, query, query, None, True)
        else:
            node.args = (query, query, query, query, 0.0, True)
        from tests.tensorrt import checking

        problem = checking._problem(node)
        assert problem is not None and message in problem
        return
    problems = problems_of_program(_program(function, *inputs, dynamic=dynamic))
    assert any(message in problem for problem in problems), problems


def test_programs_that_pass() -> None:
    def allowed(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        index = (x * 30).long()
        picked = x.gather(1, index).scatter(1, index, y)
        mean = torch.nn.functional.layer_norm(picked.cumsum(1), (40,))
        return torch.where((x > 0.5) & ~(y < 0.2), mean, x), x.amin(1), x.topk(5).values, torch.cat([x, y]).round()

    assert problems_of_program(_program(allowed, FLOATS, FLOATS)) == []
    attend = torch.nn.functional.scaled_dot_product_attention
    assert problems_of_program(_program(lambda q: attend(q, q, q, is_causal=True), torch.rand(1, 2, 8, 4))) == []


def _model(*nodes: Any, inputs: dict[str, int], output: int, opset: int = 20, initializers: Any = ()) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, [2, 40]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("out", output, None)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _constant(name: str, *values: int) -> Any:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


F, I64, D = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE
CUMSUM = helper.make_node("CumSum", ["x", "axis"], ["out"])
TOPK = helper.make_node("TopK", ["x", "k"], ["out", "places"])
REFUSED_ONNX = {
    "cumsum of ints": (_model(CUMSUM, inputs={"x": I64}, output=I64, initializers=[_constant("axis", 1)]), "INT64"),
    "clip of ints": (_model(helper.make_node("Clip", ["x"], ["out"]), inputs={"x": I64}, output=I64), "INT64"),
    "nonzero": (_model(helper.make_node("NonZero", ["x"], ["out"]), inputs={"x": F}, output=I64), "depends on data"),
    "unique": (_model(helper.make_node("Unique", ["x"], ["out"]), inputs={"x": F}, output=F), "not supported"),
    "float64": (_model(helper.make_node("Add", ["x", "x"], ["out"]), inputs={"x": D}, output=D), "DOUBLE"),
    "topk": (_model(TOPK, inputs={"x": F}, output=F, initializers=[_constant("k", 3900)]), "less than 3840"),
    "topk of data": (_model(TOPK, inputs={"x": F, "k": I64}, output=F), "less than"),
    "axes that are data": (
        _model(helper.make_node("ReduceMin", ["x", "axes"], ["out"]), inputs={"x": F, "axes": I64}, output=F),
        "initializer",
    ),
    "opset": (_model(helper.make_node("Neg", ["x"], ["out"]), inputs={"x": F}, output=F, opset=8), "opset 8"),
    "bits": (_model(helper.make_node("BitwiseAnd", ["x", "x"], ["out"]), inputs={"x": I64}, output=I64), "not supported"),
}


@pytest.mark.parametrize("name", REFUSED_ONNX)
def test_refused_files(name: str) -> None:
    model, message = REFUSED_ONNX[name]
    problems = problems_of_onnx(model)
    assert any(message in problem for problem in problems), problems


def test_files_that_pass() -> None:
    nodes = [
        helper.make_node("Less", ["x", "y"], ["less"]),
        helper.make_node("Where", ["less", "x", "y"], ["chosen"]),
        helper.make_node("CumSum", ["chosen", "axis"], ["summed"]),
        helper.make_node("ReduceMin", ["summed", "axes"], ["out"]),
    ]
    constants = [_constant("axis", 1), _constant("axes", 1)]
    assert problems_of_onnx(_model(*nodes, inputs={"x": F, "y": F}, output=F, initializers=constants)) == []


def test_the_lists_say_where_they_are_from() -> None:
    assert CONVERTERS["source"].startswith("torch_tensorrt-2.13.0") and "sha256" in CONVERTERS["source"]
    assert "onnx-tensorrt" in OPERATORS["source"]
    assert len(CONVERTERS["converters"]) > 200 and len(OPERATORS["operators"]) > 140
    assert not set(OPERATORS["operators"]) & set(OPERATORS["unsupported"])
