"""For whom dynamo is tracing: a backend that knows handles, or one that would compute on their NaN.

What `torch.compile` returns for a function has dynamo's callback in its closure, and the callback wraps the backend.
"""

from collections.abc import Callable
from typing import Any

from torch.compiler import assume_constant_result

from tgvkv_compile.private import InstructionTranslator, eval_frame

_WRAPPERS = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
"""Where torch.compile, dynamo's debug wrapper, `functools.partial` and `functools.wraps` keep the backend."""


def traced_backend() -> tuple[Any, dict[str, Any]] | None:
    """The backend with `takes_handles = True` that dynamo traces the present frame for, if it is one.

    Returns:
        The backend, and the keyword arguments that `torch.compile` has for it (`mode`, `options`); None for all others.
    """
    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # another tracer, such as non-strict export
        return None
    return _handling(backend)


def active_backend() -> tuple[Any, dict[str, Any]] | None:
    """As `traced_backend`, of frames that eager code calls now: those of compiled code that left a graph."""
    return _handling(eval_frame.get_eval_frame_callback())


def active_is_one_graph() -> bool:
    """Whether frames that eager code calls now are compiled with `fullgraph=True`."""
    return bool(getattr(eval_frame.get_eval_frame_callback(), "_one_graph", False))


def _handling(backend: Any) -> tuple[Any, dict[str, Any]] | None:
    given: dict[str, Any] = {}
    for _ in range(16):
        if getattr(backend, "takes_handles", False):
            return backend, given
        given = getattr(backend, "kwargs", None) or given
        for name in _WRAPPERS:
            wrapped = getattr(backend, name, None)
            if wrapped is not None:
                break
        backend = wrapped
    return None


def must_be_one_graph() -> bool:
    """Whether dynamo traces the present frame with `fullgraph=True`."""
    tx: Any = InstructionTranslator.current_tx()
    return bool(getattr(tx, "one_graph", False) or getattr(tx, "error_on_graph_break", False))


@assume_constant_result  # type: ignore[untyped-decorator]
def traced_for_handles() -> bool:
    """Whether the frame that dynamo traces now goes to a backend with `takes_handles = True`.

    Dynamo runs this while it traces and takes the result for a constant, which it is: compiled code is never shared
    between backends.
    """
    return traced_backend() is not None


@assume_constant_result  # type: ignore[untyped-decorator]
def traced_behind_cut() -> bool:
    """As `traced_for_handles`, for a backend with `behind_cut = True`: the cut before the decoder calls what is traced."""
    found = traced_backend()
    return found is not None and getattr(found[0], "behind_cut", False)


def never_compile(function: Callable[..., Any]) -> None:
    """Keeps dynamo from compiling `function`, and what it calls, where eager code calls it.

    Such a frame of a `__torch_function__` would be compiled once and reused for another operation: dynamo does not guard on
    bound slots such as `Tensor.shape.__get__`.
    """
    _set_strategy(function, inside=eval_frame._FrameAction.SKIP)


def never_compile_frame(function: Callable[..., Any]) -> None:
    """Keeps dynamo from compiling `function` where eager code calls it; what it calls is compiled as ever."""
    _set_strategy(function, inside=eval_frame._FrameAction.DEFAULT)


def _set_strategy(function: Callable[..., Any], *, inside: Any) -> None:
    """`function`'s own frame is skipped; `inside` is for what it calls. Dynamo can still inline it into others."""
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, inside)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


def compiled_for_handles(function: Callable[..., Any]) -> bool:
    """Whether `torch.compile` made `function`, or what it wraps, for a backend with `takes_handles = True`."""
    wrapped: Any = function
    while wrapped is not None:
        cells = getattr(wrapped, "__closure__", None) or ()
        if any(_handling(cell.cell_contents) is not None for cell in cells):
            return True
        wrapped = getattr(wrapped, "__wrapped__", None)
    return False


for _function in (active_backend, active_is_one_graph, _handling):
    never_compile_frame(_function)  # they are called where dynamo is looking for frames to compile
