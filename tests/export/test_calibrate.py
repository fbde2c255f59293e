from typing import Any

import pytest
import torch

from tests.golden.recorded import load_inputs, load_model, some
from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.capacity.calibrate import calibrate
from tgvkv_compile.ops.eviction.budgeting import allocate, segment_capacity

STEPS = 39


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("llava-small")


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5])
def test_the_plans_own_sample_is_not_clipped(model: Any, budget: float) -> None:
    inputs = load_inputs("llava-small")
    plan = calibrate(model, [inputs], budget, max_new_tokens=STEPS, slack=0.0)
    (case,) = some(f"llava-small-{budget}")
    lengths = torch.tensor([inputs["input_ids"].shape[1]])
    wish = allocate(torch.tensor([case["tv"]]), lengths, torch.tensor([64]), config=plan.eviction)
    assert wish.kept.tolist() == [[len(kept) for kept in case["kept"]]]
    needed = segment_capacity(wish.kept, wish.rate, lengths, STEPS, config=plan.eviction)
    assert plan == BudgetPlan(tuple(needed[0].tolist()), int(lengths), STEPS, EvictionConfig(budget))
    fitted = plan.fit(wish, lengths)
    assert torch.equal(fitted.kept, wish.kept) and torch.equal(fitted.rate, wish.rate)
    # What the recorded run of the authors' code held after each step has room, the next step's token included.
    assert all(length + 1 <= slots for lens in case["lens"] for length, slots in zip(lens, plan.capacities, strict=True))


def test_slack_and_longer_prompts_give_more_room(model: Any) -> None:
    inputs = load_inputs("llava-small")
    tight = calibrate(model, [inputs], 0.5, max_new_tokens=STEPS, slack=0.0)
    loose = calibrate(model, [inputs, inputs], 0.5, max_new_tokens=STEPS, slack=0.25)
    longer = calibrate(model, [inputs], 0.5, max_new_tokens=STEPS, slack=0.0, max_prompt=2 * tight.max_prompt)
    everything = calibrate(model, [inputs], 0.5, max_new_tokens=STEPS, slack=100.0)
    for layer, slots in enumerate(tight.capacities):
        assert loose.capacities[layer] == -(-slots * 5 // 4) and longer.capacities[layer] == 2 * slots
        assert everything.capacities[layer] == tight.max_prompt + STEPS


def test_the_model_stays_as_it_is(model: Any) -> None:
    inputs, flag = load_inputs("llava-small"), torch._dynamo.config.capture_scalar_outputs
    before = model(**inputs).logits
    calibrate(model, [inputs], 0.2, max_new_tokens=1)
    assert model._compiled_call_impl is None and torch._dynamo.config.capture_scalar_outputs == flag
    assert torch.equal(model(**inputs).logits, before)


def test_a_compiled_model(model: Any) -> None:
    inputs = load_inputs("llava-small")
    expected = calibrate(model, [inputs], 0.2, max_new_tokens=4)
    compiled = load_model("llava-small")
    compiled.compile(backend=tgvkv_backend(0.9, lowering="eager"))
    assert calibrate(compiled, [inputs], 0.2, max_new_tokens=4) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slack": -0.1}, "slack=-0.1"),
        ({"slack": float("nan")}, "slack=nan"),
        ({"samples": []}, "samples=list"),
        ({"samples": {"input_ids": torch.ones(1, 1)}}, "samples=dict"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"max_prompt": 10}, "max_prompt=10 must be an int >= 82"),
        ({"model": None}, "model is a NoneType"),
        ({"samples": [{"input_ids": torch.ones(1, 9, dtype=torch.int64)}]}, r"samples\[0\] holds no picture"),
    ],
)
def test_what_cannot_be_calibrated(model: Any, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": model, "samples": [load_inputs("llava-small")], "budget": 0.2, "max_new_tokens": 4}
    with pytest.raises(ConfigError, match=message):
        calibrate(**(given | changes))
