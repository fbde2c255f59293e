"""A shape environment of our own for a graph that dynamo handed over.

Dynamo's environment is closed when a rewritten graph is lowered, and it has no symbol for the arena's size. So the graph
moves: every symbolic size keeps its meaning, new ones can be added, and guards on them are ours to check.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.insert import propagate
from tgvkv_compile.fx.meta import described, fake_value, set_fake_value
from tgvkv_compile.private import (
    ConstantSource,
    DimDynamic,
    FakeTensorMode,
    ShapeEnv,
    enable_python_dispatcher,
    enable_torch_function,
    is_traceable_wrapper_subclass,
)


class Environment:
    """Fake tensors and symbols for one graph.

    Attributes:
        fake_mode: The mode that all fake values of the graph belong to.
    """

    def __init__(self) -> None:
        self.shape_env = ShapeEnv()
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._moved: dict[Any, Any] = {}
        self._moved_sizes: dict[Any, SymInt | int] = {}
        self._moved_tensors: dict[object, Tensor] = {}
        self._numbers: dict[Any, tuple[int, ...]] = {}

    def symbol(self, name: str, hint: int, *, few: bool = False) -> SymInt:
        """A new symbolic size with the value `hint` in this call.

        Dynamo makes symbols of a cache's Python ints, which begin at 0: such a one must not become a constant here.

        Args:
            name: For messages.
            hint: Its value.
            few: Whether it can be 0 or 1 in other calls; it can where `hint` is.
        """
        source = ConstantSource(name)
        few = few or hint in (0, 1)
        symbol = self.shape_env.create_symbol(
            hint,
            source=source,
            dynamic_dim=DimDynamic.DYNAMIC,
            positive=None if few else True,
            do_not_specialize_zero_one=few,
        )
        node = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(node, SymInt)
        return node

    def number(self, name: str, values: Sequence[int]) -> SymInt:
        """A new symbol that graphs are called with these values of, and with no others."""
        number = self.symbol(name, values[-1], few=True)
        self._numbers[number.node.expr] = tuple(values)
        return number

    def guards_on(self, sizes: Sequence[Any]) -> str | None:
        """An expression of what was assumed of `sizes`; see `ShapeEnv.evaluate_guards_expression`. None: nothing.

        Raises:
            InternalError: Something was assumed of a `number` that does not hold for all its values.
        """
        free = []
        for guard in self.shape_env.guards:
            numbers = guard.expr.free_symbols & self._numbers.keys()
            if not numbers:
                free.append(guard)
                continue
            known = {symbol: self.shape_env.backed_var_to_val[symbol] for symbol in guard.expr.free_symbols - numbers}
            for number in numbers:
                if not all(guard.expr.xreplace({**known, number: value}) for value in self._numbers[number]):
                    raise InternalError(f"lowering assumed {guard.expr} of {number}, one of {self._numbers[number]}")
        return self.shape_env.produce_guards_expression(sizes, guards=free)

    def tensor(self, size: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new fake tensor."""
        with self.fake_mode:
            return torch.empty(size, dtype=dtype, device=device)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Functions called within run on fake tensors of this environment, symbolic sizes included.

        Whoever calls may be run by dynamo with `__torch_function__` switched off; see `fx.subclasses`.
        """
        with enable_torch_function(), self.fake_mode, enable_python_dispatcher():
            yield

    def adopt(self, gm: GraphModule, inputs: list[Any]) -> None:
        """Makes every fake value of `gm` one of this environment: moved where its sizes are known, recomputed elsewhere.

        Args:
            gm: A graph from dynamo; its metadata is replaced.
            inputs: The example inputs, in order, for the values of the symbols.
        """
        for node, example in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            set_fake_value(node, self._move(node, fake_value(node), example))
        # `.item()` nodes make symbols that belong to these values; whoever traces the graph next makes its own.
        with self.tracing(), self.shape_env.ignore_fresh_unbacked_symbols():
            for node in gm.graph.nodes:
                if node.op in ("call_function", "call_method"):
                    value = fake_value(node)
                    if self._moves(value):
                        set_fake_value(node, self._moved_result(value))
                    else:
                        propagate(node)
                elif node.op == "get_attr":
                    set_fake_value(node, _attribute(gm, node))

    def _moves(self, value: Any) -> bool:
        """Whether a result is made of plain tensors and sizes of symbols that have been moved."""
        if isinstance(value, (tuple, list)):
            return type(value) in (tuple, list) and all(self._moves(part) for part in value)
        if isinstance(value, Tensor):
            return not is_traceable_wrapper_subclass(value) and self._moves([*value.shape, *value.stride()])
        return type(value) is int or (isinstance(value, SymInt) and value.node.expr.free_symbols <= self._moved.keys())

    def _like(self, value: Tensor) -> Tensor:
        """A fake tensor of this environment; one for all that are alike, for making one takes as long as a small kernel."""
        key = described(value)
        if key not in self._moved_tensors:
            size, stride = ([self._move_size(length, "") for length in lengths] for lengths in (value.shape, value.stride()))
            self._moved_tensors[key] = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        return self._moved_tensors[key]

    def _moved_result(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._moved_result(part) for part in value)
        return self._like(value) if isinstance(value, Tensor) else self._move_size(value, "")

    def _move(self, node: Node, old: Any, example: Any) -> Any:
        if isinstance(old, SymInt):
            return self._move_size(old, node.name)
        if isinstance(old, Tensor):
            size = tuple(self._move_size(length, f"{node.name}.size({dim})") for dim, length in enumerate(old.shape))
            stride = tuple(self._move_size(step, f"{node.name}.stride({dim})") for dim, step in enumerate(old.stride()))
            if is_traceable_wrapper_subclass(old):  # a weight that is quantised, or sharded
                names, context = old.__tensor_flatten__()
                parts = {name: getattr(old, name) for name in names}
                inner = {name: self._move(node, part, part) for name, part in parts.items()}
                return type(old).__tensor_unflatten__(inner, context, size, stride)
            with self.fake_mode:
                return torch.empty_strided(size, stride, dtype=old.dtype, device=old.device)
        return example

    def _move_size(self, size: Any, name: str) -> Any:
        if not isinstance(size, SymInt):
            return size
        expression = size.node.expr
        if expression not in self._moved_sizes:  # each layer's handles have the same ones
            self._moved_sizes[expression] = self._moved_expression(size, name)
        return self._moved_sizes[expression]

    def _moved_expression(self, size: SymInt, name: str) -> SymInt | int:
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._moved:
                hint = size.node.shape_env.backed_var_to_val[symbol]
                self._moved[symbol] = self.symbol(f"{name}:{symbol}", int(hint)).node.expr
        moved = expression.xreplace(self._moved)
        if not moved.free_symbols:
            return int(moved)
        hint = int(moved.xreplace(dict(self.shape_env.backed_var_to_val)))
        node = self.shape_env.create_symintnode(moved, hint=hint)
        assert isinstance(node, SymInt)
        return node


def size_reader(gm: GraphModule, size: Any) -> Callable[[Sequence[Any]], int]:
    """How to read a symbolic size off the graph's inputs.

    Args:
        gm: The graph.
        size: An int, or a SymInt that some input has as its value or as one of its lengths.

    Returns:
        A function from the inputs of a call to the size.

    Raises:
        InternalError: No input has that size.
    """
    if not isinstance(size, SymInt):
        fixed = int(size)
        return lambda inputs: fixed
    wanted = size.node.expr
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = fake_value(node)
        if isinstance(value, SymInt) and value.node.expr == wanted:
            return lambda inputs: int(inputs[position])
        if isinstance(value, Tensor):
            for dim, length in enumerate(value.shape):
                if isinstance(length, SymInt) and length.node.expr == wanted:
                    return lambda inputs: int(inputs[position].shape[dim])
    raise InternalError(f"no graph input has the size {size}")


def _attribute(gm: GraphModule, node: Node) -> Any:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value
