"""For `check_*.py`, which `test_interpreted.py` runs in a process of its own, where `TRITON_INTERPRET=1`."""

import os
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes sure that kernels are interpreted, mends products of bfloat16, and fills memory that nobody has written to.

    The interpreter of Triton 3.6 and 3.7 keeps bfloat16 as bits in uint16 and multiplies the bits.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Any:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", filled)
