import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.prompts import configs
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.capacity.calibrate import calibrate
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate

CONFIG = EvictionConfig(0.25, sink_tokens=1)


def _plan(**changes: Any) -> BudgetPlan:
    return dataclasses.replace(BudgetPlan((20, 30), 64, 8, CONFIG), **changes)


@given(configs(), st.integers(1, 5), st.integers(1, 2000), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_a_plan_survives_json(config: EvictionConfig, layers: int, prompt: int, steps: int) -> None:
    plan = BudgetPlan.uniform(layers, config, max_prompt=prompt, max_new_tokens=steps)
    assert BudgetPlan.from_json(plan.to_json()) == plan
    assert plan.num_layers == layers and max(plan.capacities) <= prompt + steps + config.sink_tokens + 1


@given(configs(budgeting="uniform"), st.integers(1, 2000), st.integers(0, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_a_uniform_budget_fits_a_uniform_plan(config: EvictionConfig, prompt: int, steps: int, data: st.DataObject) -> None:
    vision = data.draw(st.integers(0, prompt))
    plan = BudgetPlan.uniform(3, config, max_prompt=prompt, max_new_tokens=steps, num_vision=vision)
    lengths = torch.tensor([prompt])
    wish = allocate(torch.ones(1, 3), lengths, torch.tensor([vision]), config=config)
    fitted = plan.fit(wish, lengths)
    assert torch.equal(fitted.kept, wish.kept) and torch.equal(fitted.rate, wish.rate)


def test_a_uniform_plan_is_near_its_budget() -> None:
    plan = BudgetPlan.uniform(4, EvictionConfig(0.25), max_prompt=1000, max_new_tokens=100)
    assert plan.capacities == (277,) * 4  # a quarter of 1100, the entry over the rate and the step's own


def test_a_plan_hands_on_what_it_clips() -> None:
    wish = Allocation(torch.tensor([[40, 10]]), torch.tensor([[0.6, 0.15]]))
    fitted = _plan().fit(wish, torch.tensor([64]))
    assert fitted.kept.tolist() == [[18, 28]]  # 2 of each are for decoding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacities": ()}, "capacities=()"),
        ({"capacities": (20, 3)}, r"capacities\[1\]=3 is too small.*take 4 slots; raise"),
        ({"capacities": (20, 2.5)}, r"capacities\[1\]=2.5 must be an int"),
        ({"max_prompt": 0}, "max_prompt=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(**changes)


def test_uniform_plans_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="num_layers=0"):
        BudgetPlan.uniform(0, CONFIG, max_prompt=10, max_new_tokens=1)
    with pytest.raises(ConfigError, match="num_vision=11 is more than max_prompt=10"):
        BudgetPlan.uniform(1, CONFIG, max_prompt=10, max_new_tokens=1, num_vision=11)


def _json(**changes: Any) -> str:
    read = {**json.loads(_plan().to_json()), **changes}
    return json.dumps({name: value for name, value in read.items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "format='list'"),
        (_json(format="other"), "format='other'"),
        (_json(max_prompt="gone"), "fields: max_prompt"),
        (_json(extra=1), "fields: extra"),
        (_json(capacities=3), "capacities=3"),
        (_json(capacities=["20", 30]), r"capacities\[0\]='20'"),
        (_json(eviction={"budget": 0.5}), "eviction=.*must have exactly budget"),
        (_json(eviction=dataclasses.asdict(CONFIG) | {"budget": 2.0}), "budget=2.0 is out of range"),
    ],
)
def test_texts_that_are_no_plan(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BudgetPlan.from_json(text)


def test_a_plan_for_another_model() -> None:
    with pytest.raises(ConfigError, match="for 2 layers, the budgets are for 3"):
        _plan().fit(Allocation(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3)), torch.tensor([10]))


@pytest.mark.parametrize("option", [{"kv_dtype": "int8"}, {"memory": "64MiB"}], ids=str)
def test_options_that_engines_do_not_have(option: Any) -> None:
    with pytest.raises(ConfigError, match="is not exported"):
        calibrate(None, [], max_new_tokens=4, **option)


@pytest.mark.parametrize("option", [{"kv_dtype": "int8"}, {"budget": None, "memory": 1 << 20}], ids=str)
def test_a_plan_of_ones_own_has_none_of_them(option: Any) -> None:
    with pytest.raises(ConfigError, match="is not exported"):
        _plan(eviction=dataclasses.replace(CONFIG, **option))


def test_plans_from_before_an_option_was_there_can_be_read() -> None:
    written = json.loads(_plan().to_json())
    for option in ("ranking", "kv_dtype", "memory"):
        del written["eviction"][option]
    assert BudgetPlan.from_json(json.dumps(written)) == _plan()
