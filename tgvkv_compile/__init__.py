"""KV eviction for vision-language models as a compiler pass (TGV-KV, arXiv 2606.03075).

    model.compile(backend=tgvkv_compile.tgvkv_backend(budget=0.05))
    model.generate(**inputs)

Names are loaded when they are asked for, so that importing the package costs nothing beyond `import torch`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgvkv_compile.backend.api import compile
    from tgvkv_compile.backend.backend import tgvkv_backend
    from tgvkv_compile.backend.explain import explain
    from tgvkv_compile.backend.warm_up import warm_up
    from tgvkv_compile.errors import TgvkvError
    from tgvkv_compile.runtime.inspect import CacheReport, inspect_cache

try:
    __version__ = version("tgvkv-compile")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_WHERE = {
    "compile": "tgvkv_compile.backend.api",
    "tgvkv_backend": "tgvkv_compile.backend.backend",
    "explain": "tgvkv_compile.backend.explain",
    "warm_up": "tgvkv_compile.backend.warm_up",
    "inspect_cache": "tgvkv_compile.runtime.inspect",
    "CacheReport": "tgvkv_compile.runtime.inspect",
    "TgvkvError": "tgvkv_compile.errors",
}

__all__ = ["CacheReport", "TgvkvError", "__version__", "compile", "explain", "inspect_cache", "tgvkv_backend", "warm_up"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
