"""The one-call helper."""

from typing import Any, TypeVar

import torch

from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.backend.vision_tower import encodes_before_prefill, leave_vision_uncompiled
from tgvkv_compile.errors import ConfigError

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(model: Model, budget: float | int = 0.05, **options: Any) -> Model:
    """Compiles a model in place with a KV budget.

    Where `generate` would compile the vision tower with the rest (transformers before 5.23), the tower is left as it is:
    see `leave_vision_uncompiled`.

    Args:
        model: A transformers vision-language model (any `torch.nn.Module` whose call dynamo can trace).
        budget: Float in (0, 1]: fraction of KV kept. Int >= 1: tokens kept per layer, on average.
        **options: The other keyword arguments of `tgvkv_backend`.

    Returns:
        The same model. `model.generate(...)` and `model(...)` now evict.

    Raises:
        ConfigError: An option is unknown or out of range, or `model` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module, such as a transformers model")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ConfigError("model was wrapped by torch.compile(); give the model itself, it is compiled in place")
    backend = tgvkv_backend(budget, **options)
    if not encodes_before_prefill(model):
        leave_vision_uncompiled(model)
    model.compile(backend=backend)
    return model
