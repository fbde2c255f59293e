"""What to do about a decoder that dynamo split: where it broke the graph tells what is in the way."""

from typing import Any

from torch.fx import GraphModule

from tgvkv_compile.backend.dynamo import break_place
from tgvkv_compile.backend.origin import is_behind_cut
from tgvkv_compile.backend.wrappers import SHARDING_REMEDY

_DYNAMO = (
    "leave configure_dynamo=True (it sets torch._dynamo.config.capture_scalar_outputs and capture_dynamic_output_shape_ops), "
    "take the operation at that line out of the compiled code path, and see TORCH_LOGS=graph_breaks"
)
_HOOKS = (
    "accelerate's hooks (AlignDevicesHook) move weights or inputs between the decoder's layers: the model is offloaded to the "
    "CPU or to disk, or spread over several devices. Load it without offload, all of the decoder on one device "
    "(device_map={'': device}; in a smaller dtype or quantised where it does not fit); hooks that move nothing are taken off "
    "by accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
_CHECKPOINT = (
    "a checkpointed layer (torch.utils.checkpoint) stores into the KV cache, which running it again would do twice; pass "
    "use_cache=False, which trains without a cache and evicts nothing, or take the checkpointing off"
)
_SHARDED = f"FSDP gathers the weights of a unit before each of its calls, here between the decoder's layers. {SHARDING_REMEDY}"
_ALONE = (
    "compile the whole model, not its language model or another part of it: tgvkv_compile.compile(model), or "
    "model.compile(backend=...) with a backend that was made after the model was loaded. Embeddings in the place of tokens "
    "(inputs_embeds) are not supported; TORCH_LOGS=graph_breaks tells what dynamo left out"
)
_EMBEDDED = (
    "give input_ids, not inputs_embeds, or run uncompressed with on_unsupported='passthrough'; if neither was given, "
    "TORCH_LOGS=graph_breaks tells what dynamo left out"
)


def break_text(reason: Any | None) -> str:
    """Where dynamo broke the graph and what to do about it, to be added to a message; nothing where it did not.

    Args:
        reason: From `dynamo.graph_break`.
    """
    if reason is None:
        return ""
    return "\n" + (packed_layer(reason) or f"dynamo broke the graph at {break_place(reason)}\nRemedy: {_remedy(reason)}")


def unseen_text(gm: GraphModule) -> str:
    """What to do about a decoder that was handed embeddings of which nothing is known, to be added to a message."""
    return f"\nRemedy: {_EMBEDDED if is_behind_cut(gm) else _ALONE}"


def _remedy(reason: Any) -> str:
    if _innermost(reason).endswith("accelerate/hooks.py"):
        return _HOOKS
    if any("torch/distributed/fsdp/" in file for file in _files(reason)):
        return _SHARDED
    if "torch.utils.checkpoint" in str(reason.reason) or any("checkpoint_wrapper.py" in file for file in _files(reason)):
        return _CHECKPOINT
    return _DYNAMO


def packed_layer(reason: Any | None) -> str | None:
    """Where a graph break is in a layer of `torch.ao.nn`, whose packed weights dynamo cannot trace; None for any other."""
    if reason is None or "/torch/ao/nn/" not in (file := _innermost(reason)):
        return None
    where = f"{file}:{reason.user_stack[-1].lineno}"
    return (
        f"dynamo cannot trace the model's packed quantised layers (torch.ao.quantization, at {where}): their weights are "
        "opaque objects, and each of them breaks the graph. Quantise with torchao instead: "
        "torchao.quantization.quantize_(model, Int8WeightOnlyConfig())"
    )


def _files(reason: Any) -> list[str]:
    return [frame.filename.replace("\\", "/") for frame in reason.user_stack]


def _innermost(reason: Any) -> str:
    return files[-1] if (files := _files(reason)) else ""
