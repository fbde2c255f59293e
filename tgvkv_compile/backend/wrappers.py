"""What people put around a model: which of the modules is the one to compile.

`generate` of a wrapper is that of the model inside, which never comes to what was compiled for the wrapper. The model inside
answers either way.
"""

import contextlib
from typing import Any

import torch

from tgvkv_compile.errors import ConfigError
from tgvkv_compile.private import OptimizedModule, dynamo_config

SHARDING_REMEDY = (
    "Shard nothing inside of the decoder (one FSDP unit around the whole model), or use tensor parallelism (tp_plan='auto') or "
    "DistributedDataParallel"
)
_INSIDE = ("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The model inside of DistributedDataParallel and DeepSpeed's engine, of FullyShardedDataParallel, of a CheckpointWrapper."""


def module_of(model: Any) -> torch.nn.Module:
    """The model that answers, without what `torch.compile(model)` and the libraries of `module_to_compile` put around it.

    Raises:
        ConfigError: There is no module.
    """
    while True:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module, such as a transformers model")
        inner = model._orig_mod if isinstance(model, OptimizedModule) else _inside(model)
        if inner is None:
            return model
        model = inner


def module_to_compile(model: Any) -> torch.nn.Module:
    """The model itself, or the one that PEFT, accelerate, DistributedDataParallel, FSDP or DeepSpeed put a wrapper around.

    Raises:
        ConfigError: There is no module, or none that can be compiled in place, with the reason.
    """
    wrapper: Any = model
    while isinstance(wrapper, torch.nn.Module):
        if isinstance(wrapper, OptimizedModule):
            raise ConfigError("model was wrapped by torch.compile(); give the model itself, it is compiled in place")
        if isinstance(wrapper, torch.nn.DataParallel):
            raise ConfigError(
                "model is a DataParallel, which copies the model for every call; compile model.module and call that, in one "
                "process for each device (DistributedDataParallel)"
            )
        wrapper = _inside(wrapper)
    inner = module_of(model)
    _check_sharding(inner)
    return inner


def _inside(model: torch.nn.Module) -> Any:
    """What a wrapper is around; None where it is none."""
    base: Any = getattr(model, "get_base_model", None)
    if callable(base):  # PEFT's models
        return base()
    if hasattr(model, "inject_adapter"):  # PEFT's tuners, `PeftModel.base_model`
        return model.model
    children = list(model.named_children())
    if len(children) != 1 or children[0][0] not in _INSIDE:
        return None
    ((name, inner),) = children
    named = name == "module" and not isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return inner if not named or _is_model(inner) else None


def _is_model(module: torch.nn.Module) -> bool:
    """Whether somebody calls it, or a wrapper around it; not a part that its author named `module`."""
    return hasattr(module, "generate") or hasattr(module, "_orig_mod") or _inside(module) is not None


def _check_sharding(model: Any) -> None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for name, module in (decoder if isinstance(decoder, torch.nn.Module) else model).named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if module is not model and kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ConfigError(
                f"{name or 'the decoder'} is sharded by FSDP, which gathers its weights before each of its calls and so splits "
                f"the decoder. {SHARDING_REMEDY}"
            )


def whole_graphs() -> contextlib.AbstractContextManager[Any]:
    """Keeps dynamo from splitting the graphs of a model that `DistributedDataParallel` is calling.

    Its optimizer splits a graph at the buckets of gradients, and hides the backend. Gradients are the same without it; they are
    sent when the backward pass is done.
    """
    parallel: Any = torch.nn.parallel.DistributedDataParallel
    if getattr(parallel, "_active_ddp_module", None) is None:
        return contextlib.nullcontext()
    return dynamo_config.patch(optimize_ddp=False)  # type: ignore[no-any-return]
