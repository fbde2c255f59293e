"""Which sizes of a call dynamo takes for dynamic from the first call on: samples, tokens, and what is in the cache.

Sizes that are marked here are those that differ from call to call. Others are the model's, and stay constants. The marks are
put on views: a caller's own tensors stay as they are.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.private import maybe_mark_dynamic
from tgvkv_compile.runtime.logical import LogicalKV


def mark_decoder_inputs(vision: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The arguments of a decoder's call on a prompt, marked.

    Args:
        vision: bool `[B, N, 1]`, or None.
        kwargs: Of the call.
    """
    embeds = kwargs.get("inputs_embeds")
    like = embeds if isinstance(embeds, Tensor) else kwargs.get("input_ids")
    batch, tokens = like.shape[:2] if isinstance(like, Tensor) else (-1, -1)
    lengths = {tokens}
    mask = kwargs.get("attention_mask")
    for part in mask.values() if isinstance(mask, dict) else (mask,):
        lengths |= {part.shape[-1]} if isinstance(part, Tensor) else set()
    marked = _marked(kwargs, lambda tensor: _of_decoder(tensor, batch, tokens, lengths))
    return None if vision is None else _mark(vision, (0, 1)), marked


def _of_decoder(tensor: Tensor, batch: int, tokens: int, lengths: Collection[int]) -> tuple[int, ...]:
    """Dimensions of an argument that differ from prompt to prompt.

    A size alone does not tell: four samples are as many as the layers of a model with four, so places count as well.
    """
    if tensor.ndim == 2 and tensor.is_floating_point():
        return (0,)  # feature vectors: how many there are
    if tensor.ndim == 3 and not tensor.is_floating_point():
        return (1, 2)  # positions: [3, B, N]
    last = tensor.ndim - 1
    if tensor.ndim == 4 and tensor.shape[1] == tokens != 1:
        last = 2  # inputs of each layer: [B, N, L, D]; a mask is [B, 1, N, S]
    elif not tensor.is_floating_point() or tensor.ndim == 4:
        last += 1
    return tuple(dim for dim, size in enumerate(tensor.shape[:last]) if size in lengths or (dim == 0 and size == batch))


def mark_step_inputs(given: Any) -> Any:
    """The arguments of a decode step, marked: `[B, 1]`, `[B, S]`, `[3, B, 1]`, and caches that are no handles."""
    return _marked(
        given, lambda tensor: (1, 2) if tensor.ndim == 3 and not tensor.is_floating_point() else (0, tensor.ndim - 1)
    )


def mark_state(module: torch.nn.Module) -> None:
    """Marks what a model keeps of its prompt for the steps after it (Qwen's `rope_deltas`, `[B, 1]`)."""
    for part in {id(module): module, id(inner := getattr(module, "model", module)): inner}.values():
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.ndim > 0:
                maybe_mark_dynamic(value, 0)


def _marked(given: Any, dims: Callable[[Tensor], tuple[int, ...]]) -> Any:
    if isinstance(given, Tensor):
        return given if isinstance(given, LogicalKV) else _mark(given, dims(given))
    if type(given) is dict:
        return {name: _marked(value, dims) for name, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_marked(value, dims) for value in given)
    for layer in getattr(given, "layers", ()) if hasattr(given, "get_seq_length") else ():
        _mark_layer(layer)
    return given


def _mark_layer(layer: Any) -> None:
    """Keys and values of a cache that are tensors: how many samples and entries."""
    for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
        if isinstance(part, Tensor) and part.ndim == 4 and not isinstance(part, LogicalKV):
            for dim in (0, 2):
                maybe_mark_dynamic(part, dim)


def _mark(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    view = tensor.view_as(tensor)
    for dim in dims:
        maybe_mark_dynamic(view, dim)
    return view
