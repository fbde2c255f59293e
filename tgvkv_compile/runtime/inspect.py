"""What a compressed cache holds, for users."""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.config import name_of
from tgvkv_compile.errors import CacheError
from tgvkv_compile.runtime.compact import CompactCache, kept_positions
from tgvkv_compile.runtime.logical import LogicalKV


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """A KV cache as it is now. Numbers are taken when asked for; the report keeps the cache alive.

    Attributes:
        compressed: False for a cache that was never compressed (a text-only prompt); then everything is kept.
        num_layers: L.
        batch_size: B.
        logical_length: Tokens that the model believes are cached, padding counted.
        physical_bytes: What keys and values really occupy: the arenas with their growth reserve, and the slot positions.
        logical_bytes: What the full keys and values would occupy.
        reserve_bytes: The part of `physical_bytes` that holds no entry now: growth reserve and rounding.
        key_bytes: The part that holds keys, scales left out. What is left of it is the entries' positions, 4 bytes each.
        value_bytes: The part that holds values, scales left out.
        scale_bytes: The part that holds the scales of quantised keys and values.
        window_bytes: The part that holds the newest tokens once more, in eight bits (`kv_dtype="int4"`).
        kv_dtype: How keys and values are held, as in `tgvkv_backend`; None: in the model's own dtype.
        ranking: Which tokens stayed: the name of the policy, of a function its own; None: nothing was evicted.
        budgeting: How layers shared the budget, likewise.
    """

    compressed: bool
    num_layers: int
    batch_size: int
    logical_length: int
    physical_bytes: int
    logical_bytes: int
    reserve_bytes: int
    key_bytes: int
    value_bytes: int
    scale_bytes: int = 0
    window_bytes: int = 0
    kv_dtype: str | None = None
    ranking: str | None = None
    budgeting: str | None = None
    _compact: CompactCache | None = dataclasses.field(repr=False, default=None)

    def kept_positions(self, layer: int, sample: int = 0) -> Tensor:
        """The positions that later steps can attend to.

        Args:
            layer: 0 to `num_layers - 1`.
            sample: 0 to `batch_size - 1`.

        Returns:
            Sorted int64 `[n]` on the CPU: logical positions of prompt and generated tokens, padding not counted (the
            first token that is not padding is 0). What the last step evicted is not among them.

        Raises:
            CacheError: There is no such layer or sample.
        """
        for name, value, count in (("layer", layer, self.num_layers), ("sample", sample, self.batch_size)):
            if not 0 <= value < count:
                raise CacheError(f"{name}={value} does not exist; the cache has {count} {name}s (0 to {count - 1})")
        if self._compact is None:
            return torch.arange(self.logical_length, device="cpu")
        return kept_positions(self._compact.state, layer, sample).cpu()

    @property
    def segment_lengths(self) -> Tensor:
        """int64 `[B, L]` on the CPU: how many entries each layer of each sample holds."""
        if self._compact is None:
            return torch.full((self.batch_size, self.num_layers), self.logical_length, device="cpu")
        return self._compact.state.segment_len.cpu().clone()

    @property
    def keep_rates(self) -> Tensor:
        """float32 `[B, L]` on the CPU: the share of all tokens, generated ones included, that decoding lets each layer keep."""
        if self._compact is None:
            return torch.ones((self.batch_size, self.num_layers), device="cpu")
        return self._compact.state.keep_rate.cpu().clone()


CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the KV cache of a call and of its output, since 5.24 and before."""


def compact_of(cache: Any) -> CompactCache | None:
    """What is behind the handles of a KV cache; None where it holds none."""
    keys = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    return next((key.compact for key in keys if isinstance(key, LogicalKV)), None)


def inspect_cache(cache: Any) -> CacheReport:
    """Looks into a KV cache.

    Args:
        cache: What a compiled model returned (`generate(..., return_dict_in_generate=True)`, or `model(...)`), or the cache
            therein, `cache` or, until transformers 5.23, `past_key_values`: anything with `layers` of `keys` and `values`.

    Returns:
        A report on it. A cache that was not compressed gives one that says so.

    Raises:
        CacheError: It is not a KV cache, or it is empty.
    """
    named = (getattr(cache, name, None) for name in CACHE_NAMES)  # one by one: transformers warns of the old name
    layers = next((held.layers for held in itertools.chain((cache,), named) if hasattr(held, "layers")), ())
    holding = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    # Sliding windows are never compressed, and a report on a compressed cache leaves them out as well.
    whole = [layer for layer in holding if not getattr(layer, "is_sliding", False)]
    pairs = [(layer.keys, layer.values) for layer in whole or holding]
    if not pairs:
        raise CacheError(f"inspect_cache() was given {type(cache).__name__}, which holds no keys and values")
    handles = [key for key, _ in pairs if isinstance(key, LogicalKV)]
    if not handles:
        return _dense_report(pairs)
    compact = handles[0].compact
    if any(handle.compact is not compact for handle in handles):
        raise CacheError("the layers of this cache come from different requests")
    state = compact.state
    arena, positions, forms = state.key_arena, state.slot_position, compact.forms
    heads, num_layers = arena.shape[1], state.segment_start.shape[1]
    slots, held = arena.shape[0] * arena.shape[2], int(state.segment_len.sum())
    entry = heads * forms.bytes + positions.element_size()
    window = arena.shape[0] * int(state.segment_start[0, 0]) * entry
    return CacheReport(
        compressed=True,
        num_layers=num_layers,
        batch_size=compact.batch,
        logical_length=compact.logical_length,
        physical_bytes=slots * entry,
        logical_bytes=compact.batch * num_layers * compact.logical_length * heads * forms.unquantised_bytes,
        reserve_bytes=(slots - held) * entry - window,
        key_bytes=held * heads * forms.key.code_bytes,
        value_bytes=held * heads * forms.value.code_bytes,
        scale_bytes=held * heads * (forms.key.scale_bytes + forms.value.scale_bytes),
        window_bytes=window,
        kv_dtype=compact.config.kv_dtype,
        ranking=name_of(compact.config.ranking),
        budgeting=name_of(compact.config.budgeting),
        _compact=compact,
    )


def _dense_report(pairs: list[tuple[Tensor, Tensor]]) -> CacheReport:
    tensors = [tensor for pair in pairs for tensor in pair]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    keys = sum(key.numel() * key.element_size() for key, _ in pairs)
    first = pairs[0][0]
    return CacheReport(False, len(pairs), first.shape[0], first.shape[2], size, size, 0, keys, size - keys)
