"""Kernels behind the opaque ops: in Triton for CUDA devices (`docs/gpu.md`), in C++ for CPUs (`cpu`).

`decode` and `prefill` launch what `decode_kernels` and `prefill_kernels` hold. Only these four import Triton, and the first
call that needs them imports them: importing the package must not need it.
"""

import functools
import importlib.util

DECODE_MODES = {"ratio": 0, "fixed": 1, "keep": 2}
"""Numbers by which kernels know the values of `decode`."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed. Builds of torch for CUDA on Linux bring it; elsewhere the plain functions run."""
    return importlib.util.find_spec("triton") is not None
