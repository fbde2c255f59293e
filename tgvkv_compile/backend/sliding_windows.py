"""Sliding-window layers of a KV cache: one graph of a prompt, shorter or longer than the window, and two of a decode step.

transformers cuts what such a layer holds to its window while the model runs, and dynamo makes a graph of each length on the
way: shorter than the window, one less, just full. Behind the cut before the decoder a graph hands back all that it was given
instead, and `settle` cuts it when the graph has run. How long a layer has been running is a Python int, which dynamo takes for
a constant at first, and a window may be laid out in memory in several ways; before a graph runs, `lay_out` makes both alike.
What remains are two graphs of a step: windows that fill up, and windows that are full.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.private import DynamicInt
from tgvkv_compile.runtime.tracing import never_compile_frame, traced_behind_cut

_UNCUT = "_tgvkv_uncut"
"""On a layer: whether the last graph handed back all that it was given. On a function: that it is the one below."""


def hand_windows_back() -> None:
    """Puts functions around those of transformers' sliding-window layers; once, where transformers is loaded.

    They are others only where dynamo traces what is behind a cut.
    """
    layer = getattr(sys.modules.get("transformers.cache_utils"), "DynamicSlidingWindowLayer", None)
    if layer is not None and not hasattr(layer.update, _UNCUT):
        layer.update, layer.get_mask_sizes = _uncut(layer.update), _full_from(layer.get_mask_sizes)
        masks: Any = sys.modules.get("transformers.masking_utils")
        if hasattr(masks, "_ignore_causal_mask_sdpa"):
            masks._ignore_causal_mask_sdpa = _masked_prompts(masks._ignore_causal_mask_sdpa)


def _uncut(update: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(update)
    def update_window(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() or not traced_behind_cut() or getattr(self, "record_past", False):
            return update(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        # Slices of everything: what is handed back as it was joined is a layer to evict from (`find_appends`).
        self.keys, self.values = keys[:, :, 0:], values[:, :, 0:]
        self._tgvkv_uncut = True
        return keys, values

    setattr(update_window, _UNCUT, True)
    never_compile_frame(update_window)
    return update_window


def _full_from(get_mask_sizes: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes are the same, by another branch where the window holds all that it keeps and nothing was cut from it yet."""

    @functools.wraps(get_mask_sizes)
    def window_sizes(self: Any, query_length: Any) -> tuple[Any, Any]:
        full_from = getattr(self, "_tgvkv_full_from", self.sliding_window)
        if not torch.compiler.is_dynamo_compiling() or not traced_behind_cut() or self.cumulative_length < full_from:
            return get_mask_sizes(self, query_length)  # type: ignore[no-any-return]
        kept = self.sliding_window - 1
        return kept + query_length, self.cumulative_length - kept

    never_compile_frame(window_sizes)
    return window_sizes


def _masked_prompts(ignore_mask: Callable[..., bool]) -> Callable[..., bool]:
    """A prompt that is shorter than the window needs no mask of it; one is made all the same."""

    @functools.wraps(ignore_mask)
    def needs_none(padding_mask: Any, q_length: Any, *args: Any, **kwargs: Any) -> bool:
        if torch.compiler.is_dynamo_compiling() and q_length != 1 and traced_behind_cut():
            local = args[3] if len(args) > 3 else kwargs.get("local_attention_size")
            if local is not None:
                return False
        return ignore_mask(padding_mask, q_length, *args, **kwargs)

    never_compile_frame(needs_none)
    return needs_none


def settle(cache: Any) -> None:
    """Cuts to their windows what a graph has handed back."""
    for layer in _windows(cache):
        if vars(layer).get(_UNCUT, False):
            layer.keys, layer.values = (held[:, :, -layer.sliding_window + 1 :] for held in (layer.keys, layer.values))
            layer._tgvkv_uncut = False


def lay_out(cache: Any, *, masked: bool) -> None:
    """Makes the windows of a cache alike that a graph is to be given, whoever has left them.

    Args:
        cache: Of the call.
        masked: Whether the call has a mask of padding. Code that makes the window's mask of it takes another branch once there
            is more of it than the window; without one it does as soon as the new token fills the window.
    """
    settle(cache)  # of an output that did not hold it
    for layer in _windows(cache):
        layer._tgvkv_full_from = layer.sliding_window - (0 if masked else 1)
        if layer.cumulative_length > 0:
            full = layer.cumulative_length >= layer._tgvkv_full_from
            layer.keys, layer.values = (_laid_out(held, full) for held in (layer.keys, layer.values))
            layer.cumulative_length = DynamicInt(layer.cumulative_length)


def _windows(cache: Any) -> Iterator[Any]:
    for layer in getattr(cache, "layers", ()):
        if _UNCUT in vars(layer) or hasattr(getattr(type(layer), "update", None), _UNCUT):
            yield layer


def _laid_out(held: Tensor, full: bool) -> Tensor:
    """As a step leaves it: contiguous where it fills up; of a full window, all but the first entry of a contiguous tensor."""
    batch, heads, length, width = held.shape
    rows = length + full
    if held.stride() == (heads * rows * width, rows * width, width, 1):
        return held
    return held.new_empty((batch, heads, rows, width))[:, :, rows - length :].copy_(held)
