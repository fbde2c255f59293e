"""For whom dynamo is tracing: a backend that knows handles, or one that would compute on their NaN.

Private torch imports of the runtime, checked on torch 2.13.0:

- `InstructionTranslator.current_tx().output.compiler_fn` is the backend of the frame that is being traced.
- What `torch.compile` returns for a function has dynamo's callback in its closure, and the callback wraps the backend.
- `set_code_exec_strategy` keeps dynamo from compiling a function's frame; it can still be inlined into others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._dynamo.symbolic_convert import InstructionTranslator

_WRAPPERS = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
"""Where torch.compile, dynamo's debug wrapper, `functools.partial` and `functools.wraps` keep the backend."""


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def traced_for_handles() -> bool:
    """Whether the frame that dynamo traces now goes to a backend with `takes_handles = True`.

    Dynamo runs this while it traces and takes the result for a constant, which it is: compiled code is never shared
    between backends.
    """
    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # another tracer, such as non-strict export
        return False
    for _ in range(16):
        if getattr(backend, "takes_handles", False):
            return True
        backend = next((getattr(backend, name) for name in _WRAPPERS if getattr(backend, name, None) is not None), None)
    return False


def never_compile(function: Callable[..., Any]) -> None:
    """Keeps dynamo from compiling `function`, and what it calls, where eager code calls it.

    Such a frame of a `__torch_function__` would be compiled once and reused for another operation: dynamo does not guard on
    bound slots such as `Tensor.shape.__get__`.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skip)


def compiled_for_handles(function: Callable[..., Any]) -> bool:
    """Whether `torch.compile` made `function`, or what it wraps, for a backend with `takes_handles = True`."""
    wrapped: Any = function
    while wrapped is not None:
        cells = getattr(wrapped, "__closure__", None) or ()
        if any(_wraps_for_handles(cell.cell_contents) for cell in cells):
            return True
        wrapped = getattr(wrapped, "__wrapped__", None)
    return False


def _wraps_for_handles(callback: Any) -> bool:
    for _ in range(16):
        if getattr(callback, "takes_handles", False):
            return True
        callback = next((getattr(callback, name) for name in _WRAPPERS if getattr(callback, name, None) is not None), None)
    return False
