"""Lowering: Inductor, or `aot_eager` / `eager` for debugging."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule

from tgvkv_compile.config import CompileMode, Lowering
from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import fake_value
from tgvkv_compile.fx.subclasses import as_graph_takes
from tgvkv_compile.lower.beside import kernels_beside
from tgvkv_compile.lower.by_piece import lower_by_piece
from tgvkv_compile.lower.pieces import cut
from tgvkv_compile.private import FakeTensorMode, enable_torch_function, inductor, lookup_backend, mark_static, tracing_apart


class Lowered:
    """A compiled graph with the guards on its symbolic sizes.

    Args:
        run: The compiled graph, flat inputs to a flat list of outputs.
        environment: The environment that the graph was compiled in.
        inputs: Fake values of the graph's inputs.
        used: Which of the inputs `run` takes.
    """

    def __init__(
        self, run: Callable[..., Sequence[Any]], environment: Environment, inputs: list[Any], used: Sequence[int]
    ) -> None:
        self._run = run
        self._environment = environment
        self._used = used
        self._sizes = [(position, dim) for position, value in enumerate(inputs) for dim in _symbolic_dims(value)]
        sizes = [_size(inputs[position], dim) for position, dim in self._sizes]
        self._guards = environment.guards_on(sizes)

    def accepts(self, inputs: Sequence[Any]) -> bool:
        """Whether the sizes of `inputs` are among those that the graph was compiled for."""
        if not self._guards:
            return True
        sizes = [_size(inputs[position], dim) for position, dim in self._sizes]
        return bool(self._environment.shape_env.evaluate_guards_expression(self._guards, sizes))

    def __call__(self, *inputs: Any) -> list[Any]:
        """Runs the graph."""
        return list(self._run(*(inputs[index] for index in self._used)))


def _symbolic_dims(value: Any) -> list[int | None]:
    if isinstance(value, SymInt):
        return [None]
    if isinstance(value, Tensor):
        return [dim for dim, length in enumerate(value.shape) if isinstance(length, SymInt)]
    return []


def _size(value: Any, dim: int | None) -> Any:
    return value if dim is None else value.shape[dim]


def lower_rewritten(
    gm: GraphModule,
    environment: Environment,
    *,
    lowering: Lowering,
    mode: CompileMode | None,
    options: dict[str, Any] | None,
    static: Collection[str] | None = None,
) -> Lowered:
    """Compiles a rewritten graph in its own shape environment.

    Inputs that nothing uses are left out of it. A CUDA graph is recorded anew for every value of an int among its inputs, and
    what a step leaves unused is what grows with the answer: the attention mask, the length of the past.

    Args:
        gm: The graph; handed over (Inductor mutates it).
        environment: Where its fake values live.
        lowering: `"inductor"`, `"aot_eager"` or `"eager"`.
        mode: Inductor's mode, as in `torch.compile(mode=...)`.
        options: Inductor's options, as in `torch.compile(options=...)`.
        static: Names of the inputs that stay where they are from call to call, as weights do; a CUDA graph may write to them.
            None: the graph is not to become a CUDA graph, whatever the mode says.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [fake_value(node) for node in placeholders]
    used = [index for index, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            gm.graph.erase_node(node)
        elif static is not None and node.name in static:
            mark_static(node)
    gm.recompile()
    patches = _patches(mode, options)
    if static is None and _GRAPHS in patches:
        patches[_GRAPHS] = False
    pieces = cut(gm) if lowering == "inductor" and not patches.get(_GRAPHS) else None
    run: Callable[..., Any]
    compile_part = functools.partial(_BACKENDS[lowering], patches=patches, fake_mode=environment.fake_mode)
    with torch.no_grad(), enable_torch_function():
        if pieces is not None:
            on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor))
            with kernels_beside() if on_cpu else contextlib.nullcontext():
                run = lower_by_piece(gm, pieces, environment, compile_part)
        else:
            run = compile_part(gm, [inputs[index] for index in used])
    if not callable(run):
        raise InternalError(f"lowering={lowering!r} returned {type(run).__name__}, not a callable")
    return Lowered(_with_torch_function(run) if lowering == "eager" else run, environment, inputs, used)


def _with_torch_function(run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """A graph that nobody has traced: its nodes ask the weights' `__torch_function__` each time (see `fx.subclasses`)."""

    def called(*inputs: Any) -> Sequence[Any]:
        with enable_torch_function():
            return run(*(as_graph_takes(value) for value in inputs))

    return called


_GRAPHS = "triton.cudagraphs"


def records_cuda_graphs(lowering: Lowering, mode: CompileMode | None, options: dict[str, Any] | None) -> bool:
    """Whether Inductor is asked to record CUDA graphs."""
    return lowering == "inductor" and bool(_patches(mode, options).get(_GRAPHS))


def lower_dense(
    gm: GraphModule,
    inputs: list[Any],
    *,
    lowering: Lowering,
    mode: CompileMode | None,
    options: dict[str, Any] | None,
) -> Callable[..., Any]:
    """Compiles a graph that is none of ours, as `torch.compile` would have without us.

    Args:
        gm: The graph from dynamo.
        inputs: The example inputs from dynamo.
        lowering: As in `lower_rewritten`.
        mode: As in `lower_rewritten`.
        options: As in `lower_rewritten`.
    """
    return _BACKENDS[lowering](gm, inputs, _patches(mode, options), None)


def _patches(mode: CompileMode | None, options: dict[str, Any] | None) -> dict[str, Any]:
    chosen = dict(inductor.list_mode_options(mode)) if mode is not None else {}
    return {**chosen, **(options or {})}


def _inductor(
    gm: GraphModule, inputs: list[Any], patches: dict[str, Any], fake_mode: FakeTensorMode | None
) -> Callable[..., Any]:
    options = {**_WORKAROUNDS, **_cacheable(gm), **patches}
    with contextlib.nullcontext() if fake_mode is None else tracing_apart(fake_mode):
        return inductor.compile(gm, inputs, options=options or None)  # type: ignore[no-any-return]


_WORKAROUNDS = {} if torch.__version__ >= "2.13" else {"assert_indirect_indexing": False}
"""Inductor options that the same takes on older releases: on CPUs torch 2.11 writes the bounds check of the padding mask's
index before the index."""


def _cacheable(gm: GraphModule) -> dict[str, Any]:
    """Tells the caches on disk that the functions of this package in a graph do what the sources of this package say."""
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if str(getattr(target, "__module__", "")).startswith("tgvkv_compile.")]
    names = {f"{target.__module__}.{target.__name__}": _sources() for target in ours}
    return {"unsafe_marked_cacheable_functions": names} if names else {}


@functools.cache
def _sources() -> str:
    """A digest of all that a function in a graph may be made of."""
    files = sorted((Path(__file__).parents[1] / "ops").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _aot_eager(gm: GraphModule, inputs: list[Any], patches: dict[str, Any], fake_mode: object) -> Callable[..., Any]:
    return lookup_backend("aot_eager")(gm, inputs)


def _eager(gm: GraphModule, _inputs: list[Any], patches: dict[str, Any], fake_mode: object) -> Callable[..., Any]:
    return gm.forward


_BACKENDS: dict[Lowering, Callable[..., Callable[..., Any]]] = {
    "inductor": _inductor,
    "aot_eager": _aot_eager,
    "eager": _eager,
}
