"""All private torch imports of the package, in one place.

Checked on torch 2.11.0, 2.13.0 and 2.14.1. Each name says what it is used for:

- `FakeTensor`, `FakeTensorMode`, `ShapeEnv`, `DimDynamic`, `ConstantSource`: a shape environment of our own (`fx.environment`).
- `trace_structured`: graphs in `TORCH_TRACE` (`fx.dump`).
- `enable_python_dispatcher`: some operators decompose for symbolic sizes only with it.
- `symbolic_shapes_config`: a flag that torch before 2.13 needs (`backend.dynamo`).
- `free_symbols`, `symbol_is_type`: which sizes a piece of a graph computes with (`lower.pieces`).
- `TracingContext`, `tracing`: see `tracing_apart`.
- `is_traceable_wrapper_subclass`: whether a tensor is made of other tensors, as a `DTensor` is (`fx.environment`).
- `enable_torch_function` switches `__torch_function__` on within, whoever has switched it off (`fx.subclasses`).
- `compile_lock` is what dynamo holds while it compiles: tracing and lowering of two threads must not mix.
- `keep_mutations_after_subgraphs` mends dynamo: see there.
- `mark_static` says what `torch._dynamo.mark_static_address` says, of an input that dynamo has not seen.
- `make_fx`, `disable_proxy_modes_tracing`, `pytree`: a vision encoder is traced for pictures of a size (`export.trace.vision`).
- `DynamicInt` is an int that dynamo never takes for a constant (`backend.sliding_windows`).
- `NoHostReads`, a `TorchDispatchMode`: what a user's function may not do (`passes.told`).
- `probe_instructions`, `precompile_header`, `kernels_put_off`: what Inductor waits for the C++ compiler for (`lower.beside`);
  `digest_sources`: what its caches wait for.
- `load_cpp` compiles and loads C++ as Inductor does its own (`ops.kernels.cpu`).
- `GraphCompileReason` is what dynamo puts on a graph module as `compile_subgraph_reason`.
- `InstructionTranslator.current_tx().output.compiler_fn` is the backend of the frame that is being traced; `eval_frame` has
  what dynamo compiles the frames with that are called now, and keeps it from compiling some (`runtime.tracing`).
- `graph_break`, `maybe_mark_dynamic`, `dynamo_config`, `lookup_backend` are what dynamo documents; `OptimizedModule` is what
  `torch.compile` makes of a module.
- `inductor` compiles a graph that no dynamo is at work for (`lower.lowered`).
- `DisableTorchFunction`, `DisableTorchFunctionSubclass`: a handle is asked for its shape, a graph's input made a plain tensor.
- `parse_to` reads the arguments of `Tensor.to` (`runtime.logical`).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import _inductor as inductor
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
from torch._C import _EnableTorchFunction as enable_torch_function
from torch._C._dynamo import eval_frame
from torch._C._nn import _parse_to as parse_to
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import OptimizedModule, graph_break, lookup_backend, maybe_mark_dynamic
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import dicts
from torch._guards import TracingContext, tracing
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.sym_node import DynamicInt
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_symbols
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "ConstantSource",
    "DimDynamic",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DynamicInt",
    "FakeTensor",
    "FakeTensorMode",
    "GraphCompileReason",
    "InstructionTranslator",
    "NoHostReads",
    "OptimizedModule",
    "ShapeEnv",
    "compile_lock",
    "digest_sources",
    "disable_proxy_modes_tracing",
    "dynamo_config",
    "enable_python_dispatcher",
    "enable_torch_function",
    "eval_frame",
    "free_symbols",
    "graph_break",
    "inductor",
    "is_traceable_wrapper_subclass",
    "keep_mutations_after_subgraphs",
    "kernels_put_off",
    "load_cpp",
    "lookup_backend",
    "make_fx",
    "mark_static",
    "maybe_mark_dynamic",
    "parse_to",
    "precompile_header",
    "probe_instructions",
    "pytree",
    "set_for_all_threads",
    "symbol_is_unbacked",
    "symbolic_shapes_config",
    "trace_structured",
    "tracing_apart",
]


def set_for_all_threads(config: Any, name: str, value: Any) -> None:
    """Makes a value the default of a torch flag: a thread that has assigned none of its own reads that."""
    config._config[name].default = value


def symbol_is_unbacked(symbol: Any) -> bool:
    """Whether a symbol stands for a number that only the run of the graph tells."""
    return symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))


def probe_instructions() -> threading.Thread:
    """Begins to find out which vector instructions Inductor may use; whoever asks meanwhile, in any thread, waits for it.

    Inductor compiles and loads a small program for each set of them, and keeps what it finds.
    """
    import torch._inductor.codecache  # here and not in the thread: two that import parts of one package may see half of it
    import torch._inductor.compile_fx
    import torch._inductor.cpp_builder
    import torch._inductor.cpu_vec_isa

    cpu_vec_isa: Any = torch._inductor.cpu_vec_isa

    find = cpu_vec_isa.valid_vec_isa_list

    def probe() -> None:
        with contextlib.suppress(Exception):  # who asks for it gets the error
            find()

    def found() -> Any:
        thread.join()
        cpu_vec_isa.valid_vec_isa_list = find
        return find()

    thread = threading.Thread(target=probe, name="tgvkv-probe", daemon=True)
    cpu_vec_isa.valid_vec_isa_list = found
    thread.start()
    return thread


def digest_sources() -> None:
    """Computes what every key of Inductor's caches has in it: digests of torch's and triton's files. They are kept."""
    from torch._inductor.codecache import CacheBase, torch_key

    with contextlib.suppress(Exception):  # who looks something up gets the error
        torch_key()
        CacheBase.get_system()


_NOTHING = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(int64_t* out) {}
"""


def precompile_header() -> None:
    """Has the header compiled that Inductor's kernels on CPUs begin with, by a kernel that does nothing.

    Inductor does so before its first kernel, which takes seconds, and finds out in every process whether it still holds.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with contextlib.suppress(Exception):  # who compiles a kernel gets the error
        CppPythonBindingsCodeCache.load_pybinding(["int64_t*"], _NOTHING)


def load_cpp(source: str) -> Any:
    """Compiles a C++ library, or finds it among those that were compiled before, and loads it by `ctypes`."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators whose result, or its size, is known on the host only when the device has run."""

    _REFUSED = frozenset(
        ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs everything else."""
        if func.name().partition(".")[0] in self._REFUSED:
            raise RuntimeError(f"{func.name()} reads a tensor's values on the host")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernels_put_off() -> Iterator[list[Callable[[], None]]]:
    """Modules that Inductor writes do not wait for their kernels within.

    Yields:
        A list that is filled with what waits, in order: a module cannot be called before.
    """
    from torch._inductor.async_compile import AsyncCompile

    wait_for = AsyncCompile._wait_futures
    rest: list[Callable[[], None]] = []

    def put_off(self: AsyncCompile, scope: dict[str, Any]) -> None:
        rest.append(lambda: wait_for(self, scope))

    AsyncCompile._wait_futures = put_off  # type: ignore[method-assign]
    try:
        yield rest
    finally:
        AsyncCompile._wait_futures = wait_for  # type: ignore[method-assign]


def tracing_apart(fake_mode: Any) -> Any:
    """A tracing context with this mode: caches of compiled graphs look their guards up in its shape environment."""
    return tracing(TracingContext(fake_mode))


def keep_mutations_after_subgraphs() -> None:
    """Makes dynamo keep what a frame assigns to an object's attributes after a higher-order operator.

    Seen with torch 2.13.0: tracing the body of an operator such as `flex_attention` replaces the record of side effects,
    and an object whose attributes were assigned before it goes on writing to the old one. transformers' output collector is
    such an object: it stayed switched on behind a decoder with flex attention, and the next eager vision tower failed.
    """
    proxy: Any = getattr(dicts, "SideEffectsProxyDict", None)
    if proxy is not None and "side_effects" not in vars(proxy):
        proxy.side_effects = property(_current_side_effects, lambda self, recorded: None)


def _current_side_effects(_: Any) -> Any:
    return InstructionTranslator.current_tx().output.side_effects


def mark_static(node: Node) -> None:
    """Tells AOTAutograd and Inductor that this graph input keeps its address; a CUDA graph may read and write it in place."""
    node.meta.setdefault("tensor_dict", {})["_dynamo_static_input_type"] = "unguarded"
