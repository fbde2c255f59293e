"""The compact cache: all layers' kept KV of one request, in one arena per K and V.

Model code never sees it. It holds handles (`runtime.logical`) of the full logical shape, which keep it alive.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import CacheError
from tgvkv_compile.ops.cache.packing import evict_into, new_arena, open_window
from tgvkv_compile.ops.cache.rows import KVForms, RowForm, from_rows
from tgvkv_compile.ops.cache.window import has_window, read_window, sizes_of, slots_before, window_bound
from tgvkv_compile.ops.eviction.budgeting import growth_bound, kept_bound, segment_capacity
from tgvkv_compile.ops.state import Choice, CompactState, Reselected, Survivors

SLOT_STEP = 16
"""Arenas are rounded up to a multiple of this many slots, so that requests of like size have like arenas."""


def arena_slots(num_layers: int, length: int, reserve: int, *, config: EvictionConfig, num_vision: int | None) -> int:
    """T of a fresh arena: windows, what may be kept, the growth reserve, one scrap slot, rounded up.

    Args:
        num_layers: L.
        length: N, padding counted (no sample is longer).
        reserve: Decode steps to leave room for (a much shorter sample of a padded batch can be owed more than its share;
            then the fresh cache has room for fewer steps, see `ops.cache.packing.fitting_reserve`).
        config: The eviction options.
        num_vision: Fewest vision tokens of a sample, for `budget_of="vision"`.
    """
    kept = kept_bound(num_layers, length, config=config, num_vision=num_vision)
    growth = growth_bound(num_layers, length, reserve, config=config, num_vision=num_vision)
    return round_slots(window_bound(kept, num_layers, config.kv_dtype) + kept + growth + 1)


def round_slots(slots: int) -> int:
    """`slots` rounded up to a multiple of `SLOT_STEP`."""
    return -(-slots // SLOT_STEP) * SLOT_STEP


def select_candidates(
    kv: Sequence[tuple[Tensor, Tensor]],
    choices: Sequence[Choice],
    decided: Reselected,
    reserve: int,
    config: EvictionConfig,
) -> CompactState:
    """Packs the candidates that a later turn with new vision keeps; the arguments are those of `CompactCache.reselect`."""
    kept, rate, lengths = decided.kept, decided.keep_rate, decided.lengths
    capacity = segment_capacity(kept, rate, lengths, reserve, config=config)
    start = slots_before(kept, config.kv_dtype) + capacity.cumsum(1) - capacity
    arena = new_arena(*kv[0], round_slots(int((start[:, -1] + capacity[:, -1]).max()) + 1), config.kv_dtype)
    for layer, ((key, value), choice) in enumerate(zip(kv, choices, strict=True)):
        evict_into(arena, key, value, choice.keep, choice.positions, start[:, layer], config.kv_dtype)
        if has_window(config.kv_dtype):
            open_window(arena, key, value, choice.positions, lengths, kept, layer=layer)
    return CompactState(
        *arena,
        segment_start=start,
        segment_len=kept,
        next_slot=start + kept,
        protect_from=decided.protect_from,
        keep_rate=rate,
        lengths=lengths,
    )


_Key = tuple[Any, ...]
"""What was asked of a cache: the operation, the logical length it was asked at, its arguments."""


@dataclasses.dataclass(frozen=True)
class _Derived:
    """A cache derived from another; `indices` is kept alive for its id, `values` is what it held then."""

    cache: "weakref.ref[CompactCache]"
    indices: Tensor | None
    values: Tensor | None


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """Whom a compact cache belongs to.

    Attributes:
        backend: The backend that made it.
        weight: Address of a weight of the first layer's keys: another model's cache is told from ours by it.
        layers: L.
    """

    backend: int
    weight: int
    layers: int


class CompactCache:
    """The kept KV of one request. Updated in place by decode graphs; batch operations make new ones.

    Attributes:
        state: The tensors (see `CompactState`).
        forms: What rows of the arenas look like; None: as the model's keys and values do.
        config: The eviction options.
        identity: Whom it belongs to.
        history: bool `[B, P]`, which positions are vision; all after the last of them are text.
        logical_length: Length that the model believes in, padding counted.
        room: Decode steps that every segment has slots for.
        reserve: Decode steps that a relayout makes room for; doubles each time.
        broken: Why the contents are not to be trusted, or None.
        steps: Calls that have updated it since it was made.
        padded_turns: Whether a later turn brought padding (then `crop` is refused).
        unpadded: Whether it is known that no token in it is padding.
    """

    def __init__(
        self,
        state: CompactState,
        *,
        forms: KVForms | None = None,
        config: EvictionConfig,
        identity: CacheIdentity,
        history: Tensor,
        logical_length: int,
        reserve: int,
        room: int,
    ) -> None:
        self.state = _writable(state)
        self.forms = forms if forms is not None else KVForms.of(state.key_arena, state.value_arena)
        self.config = config
        self.identity = identity
        self.history = history
        self.logical_length = logical_length
        self.room = room
        self.reserve = reserve
        self.broken: str | None = None
        self.padded_turns = False
        self.unpadded = False
        self.steps = 0
        self._derived: dict[_Key, _Derived] = {}

    @property
    def batch(self) -> int:
        """B."""
        return self.state.key_arena.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the arena is."""
        return self.state.key_arena.device

    def ensure_room(self, tokens: int, *, appended: bool) -> None:
        """Makes sure that every segment has slots for `tokens` more tokens, growing the arena where not.

        Args:
            tokens: Tokens that the next call brings.
            appended: Whether all of them stay (a continuation); else one decode step each, which may evict.
        """
        if not appended and tokens <= self.room:
            return
        reserve = self.reserve if appended else 2 * self.reserve
        capacity = self._capacity(max(reserve, tokens))
        if appended:
            capacity = capacity + tokens
        self._relayout(capacity)  # may run out of memory; then nothing has changed
        self.reserve, self.room = reserve, max(reserve, tokens)

    def advance(self, tokens: int, lengths: Tensor) -> None:
        """Takes note of a step that a graph has done; `lengths` is copied, because a CUDA graph's outputs do not last."""
        self.state.lengths.copy_(lengths)
        self.logical_length += tokens
        self.room -= tokens
        self.steps += 1

    def candidates(self) -> list[Tensor]:
        """Inputs of a later turn with vision: `history [B, logical length]`, `lengths`, `keep_rate`, layers' `Survivors`."""
        state = self.state
        unseen = self.history.new_zeros((self.batch, self.logical_length - self.history.shape[1]))
        history = torch.cat([self.history, unseen], dim=1)
        layers = [part for layer in range(state.segment_start.shape[1]) for part in self._survivors(layer)]
        return [history, state.lengths, state.keep_rate, *layers]

    def reselect(
        self, tokens: int, kv: Sequence[tuple[Tensor, Tensor]], choices: Sequence[Choice], decided: Reselected
    ) -> None:
        """Packs what a later turn with new vision keeps into a new arena.

        Args:
            tokens: Q, padding counted.
            kv: Per layer the candidates' keys and values, `[B, Hkv, W + Q, D]`.
            choices: Per layer which candidates are kept.
            decided: The rest.
        """
        self.state = select_candidates(kv, choices, decided, self.reserve, self.config)
        self.history = decided.history
        self.logical_length += tokens
        self.room = self.reserve
        self.steps += 1

    def select(self, indices: Tensor) -> "CompactCache":
        """The cache of the samples `indices` (int64 `[B']`), in a new arena. Asked twice, it gives the same one."""
        # An inference tensor has no version to tell whether it was written to since.
        version = None if indices.is_inference() else indices._version
        key = ("select", self.logical_length, id(indices), version)
        found = self._known(key) if version is not None else None
        if found is None:
            # Equal indices in another tensor: `DynamicCache` moves or converts them anew for each layer.
            found = self._selected(indices) or self._samples(indices)
            self._remember(key, found, indices)
        return found

    def select_range(self, part: tuple[int, int, int]) -> "CompactCache":
        """The cache of the samples `range(*part)`."""
        return self._derive(
            ("range", self.logical_length, part), lambda: self._samples(torch.arange(*part, device=self.device))
        )

    def repeat(self, repeats: int) -> "CompactCache":
        """Each sample `repeats` times, in a new arena."""
        every = torch.arange(self.batch, device=self.device)
        return self._derive(("repeat", self.logical_length, repeats), lambda: self._samples(every.repeat_interleave(repeats)))

    def crop(self, length: int) -> "CompactCache":
        """The cache without the tokens at logical positions `length` and later, in a new arena.

        Raises:
            CacheError: The turns were padded, so positions cannot be told from the length.
        """
        if self.padded_turns:
            raise CacheError("crop() of a cache whose later turns were padded is not supported; crop an unpadded cache")
        return self._derive(("crop", self.logical_length, length), lambda: self._cropped(length))

    def clone(self) -> "CompactCache":
        """An independent copy."""
        return self._with(CompactState(*(x.clone() for x in self.state)), self.history)

    def usable(self) -> None:
        """Raises [`CacheError`][] where a step failed half-way and the contents are not to be trusted."""
        if self.broken is not None:
            raise CacheError(f"this cache is incomplete: {self.broken}; start the request again")

    def _samples(self, indices: Tensor) -> "CompactCache":
        self.usable()
        state = CompactState(*(tensor.index_select(0, indices) for tensor in self.state))
        return self._with(state, self.history.index_select(0, indices))

    def _with(self, state: CompactState, history: Tensor) -> "CompactCache":
        other = CompactCache(
            state,
            forms=self.forms,
            config=self.config,
            identity=self.identity,
            history=history,
            logical_length=self.logical_length,
            reserve=self.reserve,
            room=self.room,
        )
        other.padded_turns, other.unpadded = self.padded_turns, self.unpadded
        return other

    def _derive(self, key: _Key, make: Callable[[], "CompactCache"]) -> "CompactCache":
        """One derived cache per operation: `DynamicCache` asks once per layer and per K and V."""
        found = self._known(key)
        if found is None:
            found = make()
            self._remember(key, found, None)
        return found

    def _known(self, key: _Key) -> "CompactCache | None":
        """A cache that was derived before and has not been stepped since."""
        known = self._derived.get(key)
        found = known.cache() if known is not None else None
        return found if found is not None and found.steps == 0 else None

    def _selected(self, indices: Tensor) -> "CompactCache | None":
        """A cache of the same samples."""
        for key, known in self._derived.items():
            values = known.values
            if key[1] != self.logical_length or values is None:
                continue
            alike = (values.shape, values.dtype, values.device) == (indices.shape, indices.dtype, indices.device)
            if alike and torch.equal(values, indices):
                found = self._known(key)
                if found is not None:
                    return found
        return None

    def _remember(self, key: _Key, cache: "CompactCache", indices: Tensor | None) -> None:
        self._derived = {k: known for k, known in self._derived.items() if known.cache() is not None}
        values = None if indices is None else indices.clone()
        self._derived[key] = _Derived(weakref.ref(cache), indices, values)

    def _capacity(self, reserve: int) -> Tensor:
        return segment_capacity(self.state.segment_len, self.state.keep_rate, self.state.lengths, reserve, config=self.config)

    def _cropped(self, length: int) -> "CompactCache":
        self.usable()
        padding = self.logical_length - self.state.lengths
        limit = (length - padding).clamp(min=0)
        gone = self.state.slot_position >= limit[:, None]
        suffix = self._suffix_sizes()
        state = CompactState(*(x.clone() for x in self.state))
        state.slot_position.masked_fill_(gone, -1)
        kept = _entries(state)
        state = state._replace(segment_len=kept.sum(2), lengths=torch.minimum(state.lengths, limit))
        place = torch.arange(self.history.shape[1], device=self.device)
        other = self._with(state, (self.history & (place < limit[:, None]))[:, :length])
        other.logical_length = length
        other.room = self.reserve
        other._relayout(other._capacity(other.reserve))
        other._protect(suffix)
        return other

    def _survivors(self, layer: int) -> Survivors:
        """What a layer holds, in position order, padded to the longest sample."""
        state = self.state
        far = torch.iinfo(torch.int64).max
        positions = torch.where(_entries(state)[:, layer], state.slot_position.long(), far)
        # A width of at least 2: sizes 0 and 1 would be compiled for apart.
        width = max(2, int((positions < far).sum(1).max()))
        order = positions.argsort(dim=1)[:, :width]
        positions = positions.gather(1, order)
        kept = torch.where(positions < far, positions, -1)
        index = order[:, None, :, None].expand(-1, state.key_arena.shape[1], -1, state.key_arena.shape[3])
        arenas = zip((state.key_arena, state.value_arena), self.forms, strict=True)
        key, value = (self._read(layer, arena, index, kept, form) for arena, form in arenas)
        return Survivors(key, value, kept)

    def _read(self, layer: int, arena: Tensor, index: Tensor, positions: Tensor, form: RowForm) -> Tensor:
        """Keys or values of a layer in the model's dtype: the slots `index`, which hold `positions [B, W]`."""
        keys = arena is self.state.key_arena
        values = from_rows(arena.gather(2, index), form, keys=keys)
        if not has_window(form.kv_dtype):
            return values
        size = sizes_of(self.state.segment_start)
        return read_window(values, arena, self.state.slot_position, positions, form, size, layer=layer, keys=keys)

    def _suffix_sizes(self) -> Tensor:
        """`P_l`, int64 `[B, L]`: the size of the protected suffix does not change while decoding."""
        position = self.state.slot_position[:, None, :]
        return (_entries(self.state) & (position >= self.state.protect_from[:, :, None])).sum(2)

    def _protect(self, suffix: Tensor) -> None:
        """Protects the last `suffix` entries of each segment."""
        entries = _entries(self.state)
        position = torch.where(entries, self.state.slot_position[:, None, :].long(), -1)
        ordered = position.sort(dim=2, descending=True).values
        index = (torch.minimum(suffix, entries.sum(2)) - 1).clamp(min=0)
        self.state.protect_from.copy_(ordered.gather(2, index[:, :, None])[:, :, 0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _relayout(self, capacity: Tensor) -> None:
        """Moves all entries into a new arena with the given segment capacities `[B, L]`, slots in position order."""
        old = self.state
        before = int(old.segment_start[0, 0])
        slots = round_slots(before + int(capacity.sum(1).max()) + 1)
        start = before + capacity.cumsum(1) - capacity
        batch, heads = old.key_arena.shape[:2]
        key = old.key_arena.new_zeros((batch, heads, slots, old.key_arena.shape[3]))
        value = torch.zeros_like(key, dtype=old.value_arena.dtype)
        position = torch.full((batch, slots), -1, dtype=old.slot_position.dtype, device=key.device)
        key[:, :, :before] = old.key_arena[:, :, :before]
        value[:, :, :before] = old.value_arena[:, :, :before]
        position[:, :before] = old.slot_position[:, :before]
        entries = _entries(old)
        length = entries.sum(2)
        for sample in range(batch):
            for layer in range(start.shape[1]):
                source = entries[sample, layer].nonzero()[:, 0]
                source = source[old.slot_position[sample, source].argsort()]
                first = int(start[sample, layer])
                target = slice(first, first + source.shape[0])
                key[sample, :, target] = old.key_arena[sample, :, source]
                value[sample, :, target] = old.value_arena[sample, :, source]
                position[sample, target] = old.slot_position[sample, source]
        self.state = old._replace(
            key_arena=key,
            value_arena=value,
            slot_position=position,
            segment_start=start,
            segment_len=length,
            next_slot=start + length,
        )


def _writable(state: CompactState) -> CompactState:
    """The state in tensors that steps outside of `torch.inference_mode` may write to as well as steps inside."""
    with torch.inference_mode(False), torch.no_grad():
        return CompactState(*(x.clone() if x.is_inference() else x for x in state))


def _entries(state: CompactState) -> Tensor:
    """Bool `[B, L, T]`: which slots hold an entry of which layer."""
    slots = state.slot_position.shape[1]
    index = torch.arange(slots, device=state.slot_position.device)
    start = state.segment_start
    following = torch.cat([start[:, 1:], torch.full_like(start[:, :1], slots)], dim=1)
    inside = (index >= start[:, :, None]) & (index < following[:, :, None])
    return inside & (state.slot_position >= 0)[:, None, :]


def kept_positions(state: CompactState, layer: int, sample: int) -> Tensor:
    """Sorted int64 positions that layer `layer` of sample `sample` holds."""
    start = int(state.segment_start[sample, layer])
    last = layer == state.segment_start.shape[1] - 1
    end = state.slot_position.shape[1] if last else int(state.segment_start[sample, layer + 1])
    position = state.slot_position[sample, start:end].long()
    return position[position >= 0].sort().values
