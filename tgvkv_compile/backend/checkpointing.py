"""Gradient checkpointing: transformers runs such a decoder without a KV cache, so that there is nothing to evict."""

import inspect
import warnings
from typing import Any

import torch

from tgvkv_compile.errors import CacheError
from tgvkv_compile.runtime.inspect import CACHE_NAMES


def without_cache(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the cache switched off where the decoder's layers are checkpointed.

    transformers does the same inside of the decoder and logs it, which breaks the graph.

    Args:
        module: The decoder.
        kwargs: Of a call of it, or of the model around it.

    Raises:
        CacheError: The call goes on with a cache that holds tokens; each of the layers would leave it out.
    """
    if not _is_checkpointed(module):
        return kwargs
    caches = {name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None}
    for name, cache in caches.items():
        if cache.get_seq_length() > 0:
            raise CacheError(
                f"{type(module).__name__} is in training mode with gradient checkpointing, whose layers drop their KV cache, "
                f"and {name} holds {cache.get_seq_length()} tokens; call model.eval(), or call it under torch.no_grad(), or "
                "leave the cache out"
            )
    if caches or _caches_by_itself(module, kwargs):
        warnings.warn(
            "tgvkv: gradient checkpointing in training mode runs without a KV cache, so nothing is evicted; pass "
            "use_cache=False",
            stacklevel=2,
        )
    left = {name: value for name, value in kwargs.items() if name not in caches}
    return {**left, "use_cache": False} if _takes_use_cache(module) else left


def _is_checkpointed(module: torch.nn.Module) -> bool:
    """Transformers' own condition, and that of its layers."""
    if not torch.is_grad_enabled() or not module.training:
        return False
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _caches_by_itself(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("use_cache")
    return bool(getattr(getattr(module, "config", None), "use_cache", False) if wanted is None else wanted)


def _takes_use_cache(module: torch.nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return "use_cache" in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
