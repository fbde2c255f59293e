"""Compact states at addresses that stay from one request to the next: a CUDA graph replays addresses."""

import dataclasses
import threading
import weakref

import torch

from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.runtime.compact import CompactCache

SPARE = 8
"""States that are kept for requests to come; where there are more, the oldest goes."""
SLACK = 1.25
"""How much larger than needed an arena may be that is used again."""


@dataclasses.dataclass
class _Lent:
    """What a cache lives in; it changes when the cache outgrows it."""

    state: CompactState


class ArenaPool:
    """Storage that is lent to caches for as long as they live.

    Caches that live at the same time never share storage, so a step of one leaves the others alone. Moving in costs one copy of
    the state, per request and whenever its arena has grown.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[CompactState] = []
        self._lent: weakref.WeakKeyDictionary[CompactCache, _Lent] = weakref.WeakKeyDictionary()

    def settle(self, cache: CompactCache) -> None:
        """Moves the state of `cache` into storage of the pool, unless it is there. Its values stay the same.

        The storage goes back to the pool when the cache is dropped, or when it moves because it has outgrown it.
        """
        lent = self._lent.get(cache)
        if lent is not None and lent.state.key_arena is cache.state.key_arena:
            return
        storage = self._take(cache.state)
        _fill(storage, cache.state)
        if lent is None:
            lent = _Lent(storage)
            self._lent[cache] = lent
            weakref.finalize(cache, _give_back, weakref.ref(self), lent).atexit = False
        else:
            outgrown, lent.state = lent.state, storage
            self._keep(outgrown)
        cache.state = storage

    def _take(self, state: CompactState) -> CompactState:
        with self._lock:
            fitting = [free for free in self._free if _fits(free, state)]
            if fitting:
                best = min(fitting, key=lambda free: free.key_arena.shape[2])
                self._free = [free for free in self._free if free is not best]
                return best
        with torch.inference_mode(False):  # else only steps in inference mode could write to it
            return CompactState(*(torch.empty_like(part) for part in state))

    def _keep(self, state: CompactState) -> None:
        with self._lock:
            self._free = [*self._free, state][-SPARE:]


def _give_back(pool: "weakref.ref[ArenaPool]", lent: _Lent) -> None:
    alive = pool()
    if alive is not None:
        alive._keep(lent.state)


def _fits(free: CompactState, state: CompactState) -> bool:
    """Whether the state has room there, and does not waste more than `SLACK` allows."""
    slots, needed = free.key_arena.shape[2], state.key_arena.shape[2]
    return _kind(free) == _kind(state) and needed <= slots <= SLACK * needed


def _kind(state: CompactState) -> tuple[object, ...]:
    """All that two states must have in common but the number of slots."""
    key, value = state.key_arena, state.value_arena
    return (*key.shape[:2], key.shape[3], key.dtype, value.dtype, key.device, state.segment_start.shape)


_OF_LAYERS = tuple(name for name in CompactState._fields if name not in ("key_arena", "value_arena", "slot_position"))
"""The tensors that have no slots."""


def _fill(storage: CompactState, state: CompactState) -> None:
    """Copies the state; slots that it does not have are empty. The last slot still belongs to no segment."""
    slots = state.key_arena.shape[2]
    with torch.no_grad():
        for arena, source in ((storage.key_arena, state.key_arena), (storage.value_arena, state.value_arena)):
            arena[:, :, :slots].copy_(source)
            arena[:, :, slots:].zero_()  # a masked entry weighs 0, and 0 times what another request left may be NaN
        storage.slot_position[:, :slots].copy_(state.slot_position)
        storage.slot_position[:, slots:].fill_(-1)
        for name in _OF_LAYERS:
            getattr(storage, name).copy_(getattr(state, name))
