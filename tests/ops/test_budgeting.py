import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import configs, masses
from tgvkv_compile.config import Budgeting, EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import allocate, growth_bound, kept_bound, segment_capacity

BUDGETINGS: list[Budgeting] = ["tvb", "waterfill", "uniform", "pyramid"]


def _allocate(mass: list[float], length: int, config: EvictionConfig, vision: int = 20) -> tuple[list[int], list[float]]:
    allocation = allocate(torch.tensor([mass]), torch.tensor([length]), torch.tensor([vision]), config=config)
    assert allocation.kept.dtype == torch.int64
    assert allocation.rate.dtype == torch.float32
    return allocation.kept[0].tolist(), allocation.rate[0].tolist()


def test_tvb_clamps_and_does_not_hand_on() -> None:
    kept, rate = _allocate([8.0, 1.0, 1.0, 0.0], 100, EvictionConfig(budget=0.5))
    assert kept == [100, 20, 20, 5]
    assert rate == pytest.approx([1.6, 0.2, 0.2, 0.0])


def test_waterfill_keeps_the_total() -> None:
    kept, rate = _allocate([8.0, 1.0, 1.0, 0.0], 100, EvictionConfig(budget=0.5, budgeting="waterfill"))
    assert kept == [100, 48, 48, 5]  # 47.5, half to even
    assert rate == pytest.approx([n / 100 for n in kept])


def test_uniform_keeps_the_same_everywhere() -> None:
    kept, rate = _allocate([8.0, 1.0, 1.0, 0.0], 50, EvictionConfig(budget=0.25, budgeting="uniform"))
    assert kept == [12] * 4  # 12.5, half to even
    assert rate == pytest.approx([0.25] * 4)


def test_pyramid_falls_in_a_line() -> None:
    kept, rate = _allocate([8.0, 1.0, 1.0, 0.0, 5.0], 1000, EvictionConfig(budget=0.2, budgeting="pyramid"))
    assert kept == [390, 295, 200, 105, 10]  # from 200 * (2 - 1 / 20) to 200 / 20, by 95
    assert rate == pytest.approx([n / 1000 for n in kept])


def test_a_function_fills_by_its_weights() -> None:
    seen = []

    def last_twice(weights: Tensor) -> Tensor:
        seen.append(weights)
        return weights.new_tensor([[1.0, 1.0, 2.0]])

    kept, rate = _allocate([2.0, 1.0, 1.0], 100, EvictionConfig(budget=0.5, budgeting=last_twice))
    assert kept == [38, 38, 75]  # 37.5, half to even
    assert rate == pytest.approx([n / 100 for n in kept])
    torch.testing.assert_close(seen[0], torch.tensor([[0.5, 0.25, 0.25]]))


def test_tvb_rounds_the_evicted_number_half_to_even() -> None:
    assert _allocate([1.0], 51, EvictionConfig(budget=0.5))[0] == [25]  # 25.5 evicted -> 26
    assert _allocate([1.0], 53, EvictionConfig(budget=0.5))[0] == [27]  # 26.5 evicted -> 26


@pytest.mark.parametrize("budgeting", BUDGETINGS)
def test_vision_budget_keeps_all_text(budgeting: Budgeting) -> None:
    config = EvictionConfig(budget=0.25, budget_of="vision", budgeting=budgeting)
    kept, rate = _allocate([3.0, 1.0], 60, config, vision=40)
    wanted = {"uniform": [30, 30], "pyramid": [40, 21]}  # of 10 vision tokens 19.5 and 0.5, found from above
    assert kept == wanted.get(budgeting, [35, 25])
    assert rate == pytest.approx([n / 60 for n in kept])


def test_vision_budget_rounds_the_kept_number_half_to_even() -> None:
    config = EvictionConfig(budget=0.5, budget_of="vision")
    assert _allocate([1.0], 30, config, vision=5)[0] == [27]  # 2.5 kept -> 2
    assert _allocate([1.0], 30, config, vision=7)[0] == [27]  # 3.5 kept -> 4


@pytest.mark.parametrize("budgeting", BUDGETINGS)
@pytest.mark.parametrize("budget_of", ["all", "vision"])
def test_a_number_of_tokens_is_the_fraction_it_stands_for(budgeting: Budgeting, budget_of: str) -> None:
    def config(budget: float) -> EvictionConfig:
        return EvictionConfig(budget=budget, budget_of=budget_of, budgeting=budgeting)  # type: ignore[arg-type]

    mass = [3.0, 2.0, 1.5]
    of = 64 if budget_of == "all" else 32
    by_count, by_fraction = (_allocate(mass, 64, config(b), vision=32) for b in (16, 16 / of))
    assert by_count[0] == by_fraction[0]
    assert by_count[1] == pytest.approx(by_fraction[1])


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
@pytest.mark.parametrize("budgeting", BUDGETINGS)
@pytest.mark.parametrize(
    ("budget", "length", "dense"),
    [(1.0, 500, True), (0.95, 19, True), (0.95, 21, False), (64, 64, True), (64, 65, False)],
)
def test_near_one_nothing_is_ever_evicted(decode: str, budgeting: Budgeting, budget: float, length: int, dense: bool) -> None:
    config = EvictionConfig(budget=budget, budgeting=budgeting, decode=decode)  # type: ignore[arg-type]
    kept, rate = _allocate([5.0, 1.0, 1.0, 1.0], length, config, vision=9)
    assert (kept == [length] * 4 and rate == [1.0] * 4) == dense


@given(st.floats(0.5, 1.0), st.integers(1, 3000))
@example(0.9, 10)  # 10 * (1 - 0.9) is below 1 in floating point
@example(0.95, 20)
@example(0.99, 100)
def test_near_one_is_pythons_arithmetic(budget: float, length: int) -> None:
    config = EvictionConfig(budget=budget, decode="fixed", sink_tokens=0)
    _, rate = _allocate([1.0, 2.0], length, config)
    assert (rate == [1.0, 1.0]) == (int(length * (1 - budget)) == 0)


@pytest.mark.parametrize("budgeting", ["waterfill", "uniform", "tvb"])
@pytest.mark.parametrize("mass", [[0.0, 0.0], [5.0, 1.0]])
def test_without_vision_or_mass_layers_are_alike(budgeting: Budgeting, mass: list[float]) -> None:
    config = EvictionConfig(budget=0.5, budgeting=budgeting)
    vision = 10 if sum(mass) == 0 else 0
    kept, rate = _allocate(mass, 40, config, vision=vision)
    assert kept == [20, 20]
    assert rate == pytest.approx([0.5, 0.5])


def test_without_vision_a_vision_budget_keeps_everything() -> None:
    config = EvictionConfig(budget=0.1, budget_of="vision")
    assert _allocate([0.0, 0.0], 40, config, vision=0) == ([40, 40], [1.0, 1.0])


def test_samples_of_a_batch_do_not_mix() -> None:
    config = EvictionConfig(budget=0.3)
    mass = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.5, 0.1], [0.0, 0.0, 0.0]])
    lengths, vision = torch.tensor([40, 90, 60]), torch.tensor([10, 60, 0])
    together = allocate(mass, lengths, vision, config=config)
    for sample in range(3):
        row = slice(sample, sample + 1)
        alone = allocate(mass[row], lengths[row], vision[row], config=config)
        assert torch.equal(together.kept[row], alone.kept)
        assert torch.equal(together.rate[row], alone.rate)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(N, vision tokens)."""
    length = draw(st.one_of(st.integers(1, 12), st.integers(1, 100), st.integers(100, 20000)))
    return length, draw(st.integers(0, length))


@given(masses(max_layers=40), sizes(), configs())
@settings(max_examples=400)
def test_allocation_is_within_its_limits(mass: Tensor, size: tuple[int, int], config: EvictionConfig) -> None:
    length, vision = size
    layers = len(mass)
    allocation = allocate(mass[None], torch.tensor([length]), torch.tensor([vision]), config=config)
    kept, rate = allocation.kept[0], allocation.rate[0]
    assert bool(rate.isfinite().all()) and bool((rate >= 0).all())
    assert int(kept.min()) >= min(length, config.sink_tokens + 1)
    assert int(kept.max()) <= length
    if config.budget_of == "vision":
        assert int(kept.min()) >= length - vision
    for known in (vision, None):
        assert int(kept.sum()) <= kept_bound(layers, length, config=config, num_vision=known) <= layers * length
    # The bound for a longer, padded prompt holds for the shorter sample too.
    assert int(kept.sum()) <= kept_bound(layers, length + 50, config=config, num_vision=vision)


@given(masses(max_layers=16), st.integers(30, 5000), st.floats(0.02, 0.98))
@settings(max_examples=200)
def test_waterfill_meets_the_total(mass: Tensor, length: int, budget: float) -> None:
    config = EvictionConfig(budget=budget, budgeting="waterfill")
    kept = allocate(mass[None], torch.tensor([length]), torch.tensor([20]), config=config).kept[0]
    layers = len(mass)
    if int(length * (1 - budget)) > 0:
        target = min(max(length * budget, config.sink_tokens + 1), length) * layers
        assert abs(int(kept.sum()) - target) <= 0.5 * layers + 1e-5 * target
    order = mass.argsort()
    assert bool((kept[order].diff() >= 0).all())


@given(st.integers(1, 64), st.integers(1, 10000), st.floats(0.01, 1.0), st.integers(0, 5000))
def test_bounds_are_tight(layers: int, length: int, budget: float, new_tokens: int) -> None:
    for config in (EvictionConfig(budget=budget), EvictionConfig(budget=budget, budgeting="uniform")):
        sinks = config.sink_tokens
        kept = kept_bound(layers, length, config=config, num_vision=None)
        assert kept <= layers * length * budget + (sinks + 2) * layers + 1
        growth = growth_bound(layers, length, new_tokens, config=config, num_vision=None)
        if int(length * (1 - budget)) > 0:
            assert growth <= layers * budget * new_tokens + (sinks + 1) * layers + 1
    fixed = EvictionConfig(budget=budget, decode="fixed")
    if int(length * (1 - budget)) > 0:
        assert growth_bound(layers, length, new_tokens, config=fixed, num_vision=None) <= (sinks + 1) * layers


@given(masses(max_layers=24), sizes(), st.one_of(st.integers(0, 20), st.integers(0, 3000)), configs())
@settings(max_examples=400)
def test_bounds_cover_every_segment(mass: Tensor, size: tuple[int, int], new_tokens: int, config: EvictionConfig) -> None:
    length, vision = size
    layers = len(mass)
    lengths = torch.tensor([length])
    kept, rate = allocate(mass[None], lengths, torch.tensor([vision]), config=config)
    capacity = segment_capacity(kept, rate, lengths, new_tokens, config=config)
    as_tensor = segment_capacity(kept, rate, lengths, torch.tensor([new_tokens]), config=config)
    assert torch.equal(capacity, as_tensor)
    assert bool((capacity >= kept).all()) and bool((capacity <= kept + new_tokens).all())
    for known in (vision, None):
        bound = kept_bound(layers, length, config=config, num_vision=known)
        growth = growth_bound(layers, length, new_tokens, config=config, num_vision=known)
        assert int(capacity.sum()) <= bound + growth
        assert int((capacity - kept).sum()) <= growth <= layers * new_tokens
