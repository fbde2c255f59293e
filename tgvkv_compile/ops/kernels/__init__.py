"""Kernels behind the opaque ops: in Triton for CUDA devices (`triton`, `docs/gpu.md`), in C++ for CPUs (`cpu`)."""

import functools
import importlib.util

DECODE_MODES = {"ratio": 0, "fixed": 1, "keep": 2}
"""Numbers by which kernels know the values of `decode`."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed. Builds of torch for CUDA on Linux bring it; elsewhere the plain functions run."""
    return importlib.util.find_spec("triton") is not None
