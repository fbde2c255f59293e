import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import configs, masses
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate, segment_capacity
from tgvkv_compile.ops.static.capacities import fit_allocation, prompt_room


@given(masses(), st.integers(2, 300), st.integers(0, 40), configs(), st.data())
@settings(max_examples=300, deadline=None)
def test_fitting(mass: Tensor, length: int, steps: int, config: EvictionConfig, data: st.DataObject) -> None:
    layers, lengths = len(mass), torch.tensor([length])
    vision = torch.tensor([data.draw(st.integers(0, length))])
    wish = allocate(mass[None], lengths, vision, config=config)
    assume(bool(wish.rate.isfinite().all()))
    least = config.sink_tokens + 1 + steps + config.sink_tokens + 2
    capacities = tuple(data.draw(st.lists(st.integers(least, least + length), min_size=layers, max_size=layers)))
    fitted = fit_allocation(wish, lengths, capacities, steps, config=config)
    needed = segment_capacity(fitted.kept, fitted.rate, lengths, steps, config=config)[0]
    assert (needed <= torch.tensor(capacities)).all()
    room = torch.tensor([min(length, prompt_room(capacity, steps, config=config)) for capacity in capacities])
    assert int(fitted.kept.sum()) == min(int(wish.kept.sum()), int(room.sum()))
    assert (fitted.kept[0] <= room).all() and (fitted.kept[0] >= torch.minimum(wish.kept[0], room)).all()
    assert (fitted.rate <= wish.rate).all() and fitted.kept.dtype == torch.int64 and fitted.rate.dtype == torch.float32


@given(masses(), st.integers(2, 300), st.integers(0, 40), configs())
@settings(max_examples=200, deadline=None)
def test_what_fits_is_left_alone(mass: Tensor, length: int, steps: int, config: EvictionConfig) -> None:
    lengths = torch.tensor([length])
    wish = allocate(mass[None], lengths, lengths // 2, config=config)
    needed = segment_capacity(wish.kept, wish.rate, lengths, steps, config=config)[0]
    fitted = fit_allocation(wish, lengths, tuple(needed.tolist()), steps, config=config)
    assert torch.equal(fitted.kept, wish.kept) and torch.equal(fitted.rate, wish.rate)


def _fit(kept: list[int], capacities: tuple[int, ...], decode: str = "fixed") -> list[int]:
    config = EvictionConfig(0.5, decode=decode, sink_tokens=1)  # type: ignore[arg-type]
    allocation = Allocation(torch.tensor([kept]), torch.full((1, len(kept)), 0.5))
    return fit_allocation(allocation, torch.tensor([100]), capacities, 10, config=config).kept[0].tolist()


def test_a_surplus_goes_where_there_is_room() -> None:
    assert _fit([50, 10, 10], (32, 32, 52)) == [30, 17, 23]  # 20 too many; room for 20 and 40: 6 and 13, the last to the first
    assert _fit([50, 10, 10], (32, 12, 12)) == [30, 10, 10]  # no room anywhere: lost
    assert _fit([50, 10, 10], (200, 12, 12)) == [50, 10, 10]


def test_samples_of_a_batch_hand_on_their_own() -> None:
    config = EvictionConfig(0.5, decode="fixed", sink_tokens=1)
    allocation = Allocation(torch.tensor([[50, 10], [10, 20]]), torch.full((2, 2), 0.5))
    fitted = fit_allocation(allocation, torch.tensor([100, 20]), (32, 62), 10, config=config)
    assert fitted.kept.tolist() == [[30, 30], [10, 20]]


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
def test_a_sample_that_would_never_lose_anything_must_fit_too(decode: str) -> None:
    config = EvictionConfig(1.0, decode=decode)  # type: ignore[arg-type]
    lengths = torch.tensor([50])
    wish = allocate(torch.ones(1, 2), lengths, lengths, config=config)
    fitted = fit_allocation(wish, lengths, (40, 40), 20, config=config)
    assert fitted.kept.tolist() == [[prompt_room(40, 20, config=config)] * 2]
    assert (segment_capacity(fitted.kept, fitted.rate, lengths, 20, config=config) <= 40).all()
    if decode != "keep":
        assert (fitted.rate < 1.0).all()
