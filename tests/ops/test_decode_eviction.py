import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import configs, random_attention, vision_at, vision_masks
from tests.support.oracle import Oracle
from tgvkv_compile.config import DecodeMode, EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import segment_capacity
from tgvkv_compile.ops.eviction.decode import choose_eviction, next_protected


def _choose(
    attention: list[float],
    positions: list[int],
    *,
    rate: float = 0.0,
    protect_from: int = 100,
    total: int = 200,
    decode: DecodeMode = "ratio",
) -> int:
    chosen = choose_eviction(
        torch.tensor([attention]),
        torch.tensor([positions]),
        torch.tensor([sum(position >= 0 for position in positions)]),
        torch.tensor([total]),
        torch.tensor([rate]),
        torch.tensor([protect_from]),
        config=EvictionConfig(decode=decode),
    )
    assert chosen.dtype == torch.int64
    return int(chosen)


def test_the_smallest_attention_goes() -> None:
    assert _choose([0.0, 0.3, 0.2, 0.1, 0.0, 0.0], [0, 9, 12, 7, -1, 100]) == 3


def test_of_equals_the_earlier_position_goes_wherever_its_slot_is() -> None:
    assert _choose([0.5, 0.2, 0.2, 0.2], [0, 12, 7, 9]) == 2


def test_sinks_protected_and_empty_slots_stay() -> None:
    assert _choose([0.0, 0.0, 0.0, 0.0, 0.9], [3, 100, 101, -1, 4]) == 4
    assert _choose([0.0, 0.0, 0.0, 0.0], [3, 100, 101, -1]) == -1


@pytest.mark.parametrize(
    ("length", "total", "rate", "evicts"),
    [(6, 50, 0.1, True), (5, 50, 0.1, False), (6, 55, 0.1, False), (6, 51, 0.1, False), (6, 500, 1.5, False)],
)
def test_ratio_truncates(length: int, total: int, rate: float, evicts: bool) -> None:
    positions = [0, 1, 2, 3, 7, 8][:length]
    assert (_choose([0.1] * length, positions, rate=rate, total=total) >= 0) == evicts


def test_modes() -> None:
    attention, positions = [0.1] * 6, [0, 1, 2, 3, 7, 8]
    assert _choose(attention, positions, rate=0.9, decode="ratio") == -1
    assert _choose(attention, positions, rate=0.9, decode="fixed") == 4
    assert _choose(attention, positions, rate=1.6, decode="fixed") == 4  # a full layer stays as long as it is
    assert _choose(attention, positions, rate=1.0, decode="fixed") == -1  # a sample that never evicts
    assert _choose(attention, positions, rate=0.0, decode="keep") == -1


def test_at_most_one_goes_in_each_sample_of_a_batch() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, -1, 9, 10]])
    chosen = choose_eviction(
        torch.full((2, 7), 0.1),
        positions,
        torch.tensor([7, 6]),
        torch.tensor([7, 11]),
        torch.tensor([0.1, 0.1]),
        torch.tensor([6, 10]),
        config=EvictionConfig(),
    )
    assert chosen.tolist() == [4, 5]


def test_next_protected_slides_over_gaps() -> None:
    positions = torch.tensor([[9, -1, 3, 20, 14], [5, 6, 7, -1, -1]])
    assert next_protected(positions, torch.tensor([9, 6])).tolist() == [14, 7]
    assert next_protected(positions, torch.tensor([14, 7])).tolist() == [20, 7]


def test_slot_positions_may_be_int32() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 9, 12]], dtype=torch.int32)
    assert next_protected(positions, torch.tensor([9])).tolist() == [12]
    chosen = choose_eviction(
        torch.full((1, 6), 0.1),
        positions,
        torch.tensor([6]),
        torch.tensor([13]),
        torch.tensor([0.1]),
        torch.tensor([12]),
        config=EvictionConfig(),
    )
    assert chosen.tolist() == [4]


class _Followed(Oracle):
    """An oracle next to which `next_protected` is followed, and the slots in use are counted."""

    def start(self, starts: list[int]) -> None:
        self.protect_from = [torch.tensor([start]) for start in starts]
        self.most = [len(kept) for kept in self.kept]

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in range(len(self.kept)):
            attended = self.attended(layer)
            self.most[layer] = max(self.most[layer], len(attended))
            self.protect_from[layer] = next_protected(torch.tensor([attended]), self.protect_from[layer])
            before = set(attended)
            self.decode(layer, torch.rand(len(attended), generator=generator))
            assert int(self.protect_from[layer]) == self._protected[layer][self._generated[layer]]
            kept = self.kept[layer]
            assert kept == sorted(set(kept)) and set(kept) <= before and len(before) - len(kept) <= 1
            # The last P entries are still the protected ones.
            assert kept[-self.suffix[layer]] == int(self.protect_from[layer])


def _followed(vision: Tensor, config: EvictionConfig, seed: int, skew: float) -> _Followed:
    oracle = _Followed(config)
    attention = random_attention(3, len(vision), seed=seed)
    # Layers look at vision to different degrees.
    weight = 1 + torch.tensor([0.0, 1.0, 30.0])[:, None, None] * skew * vision
    attention = attention * weight
    oracle.prefill(attention / attention.sum(-1, keepdim=True), vision)
    oracle.start([protected[0] for protected in oracle._protected])
    return oracle


@given(vision_masks(max_length=30), configs(), st.integers(0, 40), st.integers(0, 6), st.integers(0, 40), st.floats(0, 1))
@settings(max_examples=150)
def test_segments_suffice_and_suffixes_slide(
    vision: Tensor, config: EvictionConfig, steps: int, extended: int, more: int, skew: float
) -> None:
    """Simulates decoding, a continuation and decoding again, from any prompt in any mode."""
    oracle = _followed(vision, config, seed=steps, skew=skew)

    def capacity(tokens: int, total: int) -> list[int]:
        kept = torch.tensor([[len(kept) for kept in oracle.kept]])
        return segment_capacity(kept, oracle.rate[None], torch.tensor([total]), tokens, config=config)[0].tolist()

    expected = capacity(steps, len(vision))
    dense = bool((oracle.rate == 1).all()) and all(len(kept) == len(vision) for kept in oracle.kept)
    start = [len(kept) for kept in oracle.kept]
    for step in range(steps):
        oracle.step(step)
    assert all(used <= room for used, room in zip(oracle.most, expected, strict=True))
    if config.decode == "keep" or (dense and config.decode == "fixed"):
        assert [len(kept) for kept in oracle.kept] == [n + steps for n in start]
    if extended:
        total = len(vision) + steps
        oracle.extend(extended)
        for layer in range(3):
            assert oracle.kept[layer][-extended:] == list(range(total, total + extended))
        oracle.start([total] * 3)
        expected = capacity(more, total + extended)
        for step in range(more):
            oracle.step(1000 + step)
        assert all(used <= room for used, room in zip(oracle.most, expected, strict=True))


@given(vision_masks(min_length=8, max_length=30), configs(decode="ratio", budget_of="all"))
@settings(max_examples=40)
def test_capacity_is_not_generous(vision: Tensor, config: EvictionConfig) -> None:
    """What it allows over what is used is at most the sinks and the two slots of rounding."""
    oracle = _followed(vision, config, seed=1, skew=0.5)
    kept = torch.tensor([[len(kept) for kept in oracle.kept]])
    room = segment_capacity(kept, oracle.rate[None], torch.tensor([len(vision)]), 30, config=config)[0].tolist()
    for step in range(30):
        oracle.step(step)
    assert all(room[layer] - oracle.most[layer] <= config.sink_tokens + 2 for layer in range(3))


def test_nothing_evictable_yet_in_a_prompt_without_vision() -> None:
    """The suffix covers the sinks at first, so that lengths grow by `sink_tokens` before anything can go."""
    oracle = _followed(torch.zeros(60, dtype=torch.bool), EvictionConfig(budget=0.1, decode="fixed"), seed=0, skew=0.0)
    assert [len(kept) for kept in oracle.kept] == [6, 6, 6]
    for step in range(20):
        oracle.step(step)
    assert [len(kept) for kept in oracle.kept] == [10, 10, 10]
    assert oracle.most == [11, 11, 11]


def test_fixed_length_never_grows() -> None:
    config = EvictionConfig(budget=0.3, decode="fixed")
    oracle = _followed(vision_at(40, (5, 25)), config, seed=3, skew=1.0)
    before = [len(kept) for kept in oracle.kept]
    assert 40 in before or max(before) > min(before)
    for step in range(30):
        oracle.step(step)
        assert [len(kept) for kept in oracle.kept] == before


@pytest.mark.parametrize("budget", [1.0, 0.99, 64])
def test_near_one_nothing_goes_while_decoding(budget: float) -> None:
    for decode in ("ratio", "fixed"):
        config = EvictionConfig(budget=budget, decode=decode)
        oracle = _followed(vision_at(40, (5, 25)), config, seed=3, skew=1.0)
        for step in range(60):
            oracle.step(step)
        assert oracle.kept == [list(range(100))] * 3
