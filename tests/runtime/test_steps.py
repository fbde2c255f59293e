"""Steps on caches that were reordered, cropped, copied, grown; and use of the wrong cache."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from tests.passes.decoder import Decoder, features, tokens
from tests.runtime.requests import Pairs, compiled, handles, in_cache, kept, pairs, prefill, step, turn
from tgvkv_compile.errors import CacheError, StaleCacheError, UnsupportedGraphError
from tgvkv_compile.runtime import compact as runtime_compact

STEPS = 14


def steps(model: Decoder, caches: Pairs, count: int, first: int = 0) -> tuple[torch.Tensor, Pairs]:
    """Logits of `count` steps, `[count, B, vocabulary]`."""
    rows = []
    for number in range(first, first + count):
        logits, caches = step(model, caches, token=number % 9)
        rows.append(logits)
    return torch.stack(rows), caches


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
def test_growth_changes_nothing(decode: str) -> None:
    """The arena grows at every step, at every second, at every third; the tokens and entries stay those of a large one."""
    large = compiled(0.4, decode=decode, growth_reserve=64)
    expected, after = steps(large, prefill(large, 2), STEPS)
    positions = kept(after)
    if decode == "keep":
        assert all(19 + STEPS - 1 in layer and 19 in layer for row in positions for layer in row)
    for reserve in (1, 2, 3):
        model = compiled(0.4, decode=decode, growth_reserve=reserve)
        caches = prefill(model, 2)
        compact = handles(caches)[0].compact
        arenas = {compact.state.key_arena.shape[2]}
        logits = []
        for number in range(STEPS):
            row, caches = step(model, caches, token=number % 9)
            logits.append(row)
            arenas.add(compact.state.key_arena.shape[2])
        torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-4)
        assert kept(caches) == positions
        assert compact.reserve > reserve  # it did grow
        if decode == "keep":
            assert len(arenas) > 1


def conversation(model: Decoder, caches: Pairs) -> tuple[list[torch.Tensor], Pairs]:
    """Logits of steps, a text, steps, a picture, steps."""
    rows: list[torch.Tensor] = []
    for part in (3, False, 3, True, 4):
        if isinstance(part, bool):
            row, caches = turn(model, caches, picture=part)
            rows.append(row)
            continue
        for token in range(part):
            row, caches = step(model, caches, token=token)
            rows.append(row)
    return rows, caches


def test_the_reserve_runs_out_at_every_step_of_a_conversation() -> None:
    large = compiled(0.4, growth_reserve=64)
    expected, after = conversation(large, prefill(large, 2))
    model = compiled(0.4, growth_reserve=1)  # so it grows all the time
    start = prefill(model, 2)
    for room in (None, *range(6)):
        caches = copy.deepcopy(start)
        compact = handles(caches)[0].compact
        if room is not None:
            compact._relayout(compact._capacity(room))  # not a slot more than `room` steps need
            compact.room, compact.reserve = room, 3
        slots = compact.state.key_arena.shape[2]
        rows, caches = conversation(model, caches)
        for row, wanted in zip(rows, expected, strict=True):
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
        assert kept(caches) == kept(after)
        assert handles(caches)[0].compact.state.key_arena.shape[2] > slots


def test_a_picture_turn_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(0.4)
    caches = prefill(model, 2)
    expected, _ = turn(model, copy.deepcopy(caches), picture=True)
    before = kept(caches)
    with monkeypatch.context() as patch:
        patch.setattr(runtime_compact, "evict_into", lambda *_: (_ for _ in ()).throw(MemoryError("no memory left")))
        with pytest.raises(MemoryError):
            turn(model, caches, picture=True)
    assert kept(caches) == before
    got, _ = turn(model, caches, picture=True)
    torch.testing.assert_close(got, expected)


def test_pictures_of_reordered_samples_are_told_apart() -> None:
    """Which positions are vision goes along with a sample."""
    model = compiled(0.4)
    caches = prefill(model, 2)
    history = handles(caches)[0].compact.history
    assert history.nonzero()[:, 1].tolist() == [*range(6, 14)] * 2
    history[1] = False  # as if the second sample had none, so that the two differ
    cache = in_cache(caches)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    turned = handles(pairs(cache))[0].compact
    assert turned.history.any(1).tolist() == [False, True, False]
    cache.crop(-10)
    assert handles(pairs(cache))[0].compact.history.nonzero().tolist() == [[1, 6], [1, 7], [1, 8]]


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
def test_a_reserve_that_is_used_up_at_any_step_changes_nothing(decode: str) -> None:
    """Every reserve from one step to all of them, with a later turn before, at and after its end, against a large one."""
    model = compiled(0.4, decode=decode)

    def start(reserve: int) -> Pairs:
        caches = prefill(model, 2)
        compact = handles(caches)[0].compact
        compact._relayout(compact._capacity(reserve))
        compact.reserve = compact.room = reserve
        return caches

    def go(caches: Pairs, before: int) -> tuple[torch.Tensor, Pairs]:
        first, caches = steps(model, caches, before)
        with torch.no_grad():
            turn, caches = model(tokens(2)[:, :3], None, caches)
        last, caches = steps(model, caches, 3)
        return torch.cat([first, turn[None, :, -1], last]), caches

    large, after = steps(model, start(64), STEPS)
    for reserve in range(1, STEPS + 1):
        found, caches = steps(model, start(reserve), STEPS)
        torch.testing.assert_close(found, large, rtol=1e-4, atol=1e-4)
        assert kept(caches) == kept(after)
    for before in range(1, 5):
        expected, after = go(start(64), before)
        for reserve in range(1, 5):
            found, caches = go(start(reserve), before)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert kept(caches) == kept(after)


def test_a_full_budget_is_the_uncompressed_model_through_all_growth() -> None:
    model, plain = compiled(1.0, growth_reserve=1), Decoder()
    caches = prefill(model)
    with torch.no_grad():
        _, full = plain(tokens(), features())
    for number in range(6):
        logits, caches = step(model, caches, token=number)
        expected, full = step(plain, full, token=number)
        torch.testing.assert_close(logits, expected)
    assert kept(caches) == [[list(range(25))] * 2]


@pytest.fixture
def model() -> Decoder:
    return compiled(0.4)


def test_reordered_samples_go_on_as_themselves(model: Decoder) -> None:
    caches = prefill(model, 2)
    expected, _ = steps(model, copy.deepcopy(caches), 4)
    assert not torch.allclose(expected[:, 0], expected[:, 1])
    cache = in_cache(caches)
    before = kept(caches)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert len({id(handle.compact) for handle in handles(pairs(cache))}) == 1
    assert kept(pairs(cache)) == before[::-1] and cache.get_seq_length() == 19
    got, _ = steps(model, pairs(cache), 4)
    torch.testing.assert_close(got, expected[:, [1, 0]])


def test_beams_that_share_a_parent_part_ways(model: Decoder) -> None:
    caches = prefill(model, 2)
    expected, _ = steps(model, copy.deepcopy(caches), 3)
    cache = in_cache(caches)
    for _ in range(2):  # the same indices, step after step
        cache.reorder_cache(torch.tensor([1, 1]))
    got, _ = steps(model, pairs(cache), 3)
    torch.testing.assert_close(got, expected[:, [1, 1]])


@pytest.mark.parametrize("indices", [torch.tensor([1]), [1], torch.tensor([False, True]), slice(1, 2)])
def test_selected_samples_go_on(model: Decoder, indices: Any) -> None:
    caches = prefill(model, 2)
    expected, _ = steps(model, copy.deepcopy(caches), 3)
    cache = in_cache(caches)
    before = kept(caches)
    cache.batch_select_indices(indices)
    assert kept(pairs(cache)) == before[1:]
    got, _ = steps(model, pairs(cache), 3)
    torch.testing.assert_close(got, expected[:, [1]])


def test_repeated_samples_go_on(model: Decoder) -> None:
    caches = prefill(model)
    expected, _ = steps(model, copy.deepcopy(caches), 3)
    cache = in_cache(caches)
    cache.batch_repeat_interleave(3)
    assert kept(pairs(cache)) == kept(caches) * 3
    got, _ = steps(model, pairs(cache), 3)
    torch.testing.assert_close(got, expected.expand(-1, 3, -1))


@pytest.mark.parametrize("taken", [1, 3])
def test_a_cropped_cache_is_the_one_before(taken: int) -> None:
    """Where nothing is evicted while decoding, taking tokens back is exact."""
    model = compiled(0.4, decode="keep", growth_reserve=2)
    caches = prefill(model, 2)
    twin = copy.deepcopy(caches)
    expected, _ = steps(model, twin, 4, first=5)
    _, longer = steps(model, caches, taken)
    cache = in_cache(longer)
    cache.crop(-taken)
    assert cache.get_seq_length() == 19
    got, after = steps(model, pairs(cache), 4, first=5)
    torch.testing.assert_close(got, expected)
    assert all(layer[-4:] == [19, 20, 21, 22] for row in kept(after) for layer in row)


def test_a_cropped_cache_holds_what_was_left(model: Decoder) -> None:
    _, longer = steps(model, prefill(model), 6)
    before = kept(longer)
    cache = in_cache(longer)
    cache.crop(-4)
    assert kept(pairs(cache)) == [[[p for p in layer if p < 21] for layer in row] for row in before]
    _, after = steps(model, pairs(cache), 2)
    assert all(22 in layer for row in kept(after) for layer in row)


def test_one_picture_many_questions(model: Decoder) -> None:
    caches = prefill(model)
    first = copy.deepcopy(caches)
    one, _ = steps(model, first, 5)
    again, _ = steps(model, copy.deepcopy(caches), 5)
    last, _ = steps(model, caches, 5)
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    torch.testing.assert_close(one, last, rtol=0, atol=0)


def test_an_old_cache_is_stale(model: Decoder) -> None:
    caches = prefill(model)
    _, newer = step(model, caches)
    with pytest.raises(StaleCacheError, match=r"it has 19 tokens, but 20 have been put into it.*copy.deepcopy"):
        step(model, caches)
    step(model, newer)


def test_layers_of_two_requests_do_not_mix(model: Decoder) -> None:
    one, other = prefill(model), prefill(model)
    with pytest.raises(CacheError, match="layer 1 of the KV cache belongs to another cache than layer 0 does"):
        step(model, [one[0], other[1]])
    with pytest.raises(CacheError, match="the keys of layer 0 were given as the values of 0"):
        step(model, [(one[0][1], one[0][0]), one[1]])
    with pytest.raises(CacheError, match="the keys of layer 0 were given as the keys of 1"):
        step(model, [one[1], one[0]])
    plain = [(torch.zeros(1, 2, 19, 4), torch.zeros(1, 2, 19, 4)), one[1]]
    with pytest.raises(UnsupportedGraphError, match="some layers of the cache are compressed and some are not"):
        step(model, plain)
    step(model, one)


def test_the_arena_goes_with_the_request(model: Decoder) -> None:
    caches = prefill(model)
    _, caches = steps(model, caches, 2)
    arena = weakref.ref(handles(caches)[0].compact.state.key_arena)
    other = prefill(model)
    assert arena() is not None
    del caches
    gc.collect()
    assert arena() is None
    step(model, other)


def test_a_select_under_inference_mode(model: Decoder) -> None:
    with torch.inference_mode():
        caches = prefill(model, 2)
        expected, _ = steps(model, copy.deepcopy(caches), 2)
        cache = in_cache(caches)
        cache.reorder_cache(torch.tensor([1, 0]))
        got, _ = steps(model, pairs(cache), 2)
    torch.testing.assert_close(got, expected[:, [1, 0]])
