"""States at addresses that stay: what a CUDA graph needs of a cache. All of it is testable without one."""

import copy
import gc

import pytest
import torch

from tests.passes.decoder import Decoder
from tests.runtime.requests import compiled, handles, prefill, step
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.runtime import arena_pool
from tgvkv_compile.runtime.arena_pool import ArenaPool
from tgvkv_compile.runtime.compact import CompactCache, kept_positions

# What goes wrong where an arena is given back, in a finaliser, is otherwise only a warning.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model() -> Decoder:
    return compiled(growth_reserve=4)


@pytest.fixture
def pool() -> ArenaPool:
    return ArenaPool()


def request(model: Decoder, batch: int = 1) -> CompactCache:
    return handles(prefill(model, batch))[0].compact


def addresses(cache: CompactCache) -> list[int]:
    return [part.data_ptr() for part in cache.state]


def test_moving_in_changes_no_value_and_happens_once(model: Decoder, pool: ArenaPool) -> None:
    cache = request(model, 2)
    before = CompactState(*(part.clone() for part in cache.state))
    old = addresses(cache)
    pool.settle(cache)
    settled = addresses(cache)
    assert not set(settled) & set(old)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cache.state, before, strict=True))
    pool.settle(cache)
    assert addresses(cache) == settled


def test_the_next_request_gets_the_same_addresses(model: Decoder, pool: ArenaPool) -> None:
    first = request(model)
    pool.settle(first)
    lent = addresses(first)
    second = request(model)
    pool.settle(second)
    assert not set(addresses(second)) & set(lent)  # both live
    for part in first.state:
        part.fill_(1)
    del first
    gc.collect()
    third, wanted = request(model), request(model)
    pool.settle(third)
    assert addresses(third) == lent
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(third.state, wanted.state, strict=True))


def larger(cache: CompactCache, slots: int) -> CompactState:
    """A state of as many slots more, full of what another request left."""
    state = cache.state
    arenas = [torch.full((*x.shape[:2], x.shape[2] + slots, x.shape[3]), float("nan")) for x in state[:2]]
    position = torch.full((state.slot_position.shape[0], state.slot_position.shape[1] + slots), 7, dtype=torch.int32)
    return CompactState(*arenas, position, *(torch.empty_like(x) for x in state[3:]))


@pytest.mark.parametrize(("more", "used"), [(0.2, True), (0.5, False), (-0.1, False)])
def test_a_larger_arena_is_used_again_unless_much_is_wasted(more: float, used: bool, model: Decoder, pool: ArenaPool) -> None:
    caches = prefill(model)
    cache = handles(caches)[0].compact
    slots = int(more * cache.state.key_arena.shape[2])
    free = larger(cache, slots)
    pool._keep(free)
    expected = copy.deepcopy(caches)
    pool.settle(cache)
    assert (cache.state.key_arena is free.key_arena) == used
    found, wanted = caches, expected
    for _ in range(7):  # grows on the way, and moves out
        (logits, found), (want, wanted) = step(model, found), step(model, wanted)
        torch.testing.assert_close(logits, want, rtol=0, atol=0)
    states = [handles(pairs)[0].compact.state for pairs in (found, wanted)]
    for layer in range(2):
        assert torch.equal(*(kept_positions(state, layer, 0) for state in states))


def test_storage_that_was_outgrown_goes_back(model: Decoder, pool: ArenaPool) -> None:
    caches = prefill(model)
    cache = handles(caches)[0].compact
    pool.settle(cache)
    small = cache.state
    for _ in range(6):
        _, caches = step(model, caches)
    assert cache.state.key_arena is not small.key_arena
    pool.settle(cache)
    assert [free.key_arena is small.key_arena for free in pool._free] == [True]


def test_another_shape_or_dtype_does_not_fit(model: Decoder, pool: ArenaPool) -> None:
    pool._keep(request(model, 2).state)
    one = request(model)
    half = one.state._replace(value_arena=one.state.value_arena.half())
    pool._keep(half)
    pool.settle(one)
    assert len(pool._free) == 2 and one.state.value_arena.dtype == torch.float32


def test_what_is_kept_is_bounded(model: Decoder, pool: ArenaPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_pool, "SPARE", 2)
    caches = [request(model) for _ in range(4)]
    for cache in caches:
        pool.settle(cache)
    del cache
    caches.clear()
    gc.collect()
    assert len(pool._free) == 2


def test_a_pool_that_is_gone_keeps_nothing(model: Decoder) -> None:
    cache, pool = request(model), ArenaPool()
    pool.settle(cache)
    del pool
    gc.collect()
    del cache  # its finaliser finds no pool
    gc.collect()


def test_steps_in_inference_mode_and_outside_write_to_the_same_storage(model: Decoder, pool: ArenaPool) -> None:
    with torch.inference_mode():
        cache = request(model)
        pool.settle(cache)
    assert not any(part.is_inference() for part in cache.state)
    cache.state.segment_len.add_(0)
