"""The C++ sources beside this file, compiled, and how their functions are called."""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tgvkv_compile.errors import first_line
from tgvkv_compile.private import load_cpp

log = logging.getLogger("tgvkv_compile")

_SOURCES = ("lanes.h", "codes.h", "decode.cpp", "quantised.cpp", "weigh.cpp")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def compiled() -> Any:
    """What the sources become, loaded; None where there is no C++ compiler that works, which is said once.

    Inductor compiles and caches it as it does its own kernels.
    """
    source = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _SOURCES)
    try:
        return load_cpp(source)
    except Exception as error:  # a compiler that is missing or fails has no common class of errors
        log.warning("scores and decode steps on CPUs are several times slower: C++ failed to compile (%s)", first_line(error))
        return None


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The kernel of this name for tensors of this dtype; None: there is none."""
    if dtype not in _DTYPES:
        return None
    loaded = compiled()
    return None if loaded is None else getattr(loaded, f"{name}_{_DTYPES[dtype]}")


def record(sizes: Sequence[str], pointers: Sequence[str]) -> type[ctypes.Structure]:
    """The struct that a kernel takes: int64 sizes, the double `scale`, then pointers, as the source declares them."""
    fields = (
        *((name, ctypes.c_int64) for name in sizes),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in pointers),
    )
    return type("Record", (ctypes.Structure,), {"_fields_": fields})
