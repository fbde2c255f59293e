"""The one-call helper."""

from typing import Any, TypeVar

import torch

from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.backend.wrappers import module_to_compile

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(model: Model, budget: float | int | None = None, **options: Any) -> Model:
    """Compiles a model in place with a KV budget.

    Args:
        model: A transformers vision-language model (any `torch.nn.Module` whose call dynamo can trace). Where PEFT,
            accelerate, DistributedDataParallel or FSDP put a wrapper around one, the model inside is compiled.
        budget: Float in (0, 1]: fraction of KV kept. Int >= 1: tokens kept per layer, on average. 0.05 by default.
        **options: The other keyword arguments of `tgvkv_backend`.

    Returns:
        The same model. `model.generate(...)` and `model(...)` now evict.

    Raises:
        ConfigError: An option is unknown or out of range, or `model` is not a module or one that cannot be compiled in place.
    """
    module_to_compile(model).compile(backend=tgvkv_backend(budget, **options))
    return model
