"""The positions that the authors' released code kept, recorded for 21 settings, exactly."""

from typing import Any

import pytest
import torch

from tests.ops.prompts import case_name, case_vision, keep_per_layer, recorded
from tests.support.oracle import Oracle
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.decode import choose_eviction, next_protected
from tgvkv_compile.ops.token_types import classify_tokens

CASES, ARRAYS = recorded()


def test_recorded_cases_are_all_there() -> None:
    assert len(CASES) == 21
    assert sum(len(case["decode"]) for case in CASES) == 21 * 24


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_oracle_keeps_what_was_recorded(case: dict[str, Any]) -> None:
    oracle = Oracle(EvictionConfig(budget=case["budget"]))
    oracle.prefill(ARRAYS[f"attn{case['seed']}"], case_vision(case))
    assert oracle.kept == case["kept"]
    assert oracle.suffix == case["suffix"]
    steps = ARRAYS[f"decode{case['seed']}"]
    for step, expected in enumerate(case["decode"]):
        for layer in range(case["L"]):
            oracle.decode(layer, steps[layer, step, oracle.attended(layer)])
        assert oracle.kept == expected, f"step {step}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_prefill_functions_keep_what_was_recorded_in_a_batch(case: dict[str, Any]) -> None:
    attention = ARRAYS[f"attn{case['seed']}"].mean(1)
    token_types = classify_tokens(case_vision(case).expand(3, -1), None)
    kept = keep_per_layer(attention.unsqueeze(1).expand(-1, 3, -1, -1), token_types, EvictionConfig(budget=case["budget"]))
    assert kept == [case["kept"]] * 3


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_decode_functions_keep_what_was_recorded_with_all_layers_as_a_batch(case: dict[str, Any]) -> None:
    """One slot per position, layers as the batch, `protect_from` slid by `next_protected`."""
    config = EvictionConfig(budget=case["budget"])
    oracle = Oracle(config)
    oracle.prefill(ARRAYS[f"attn{case['seed']}"], case_vision(case))
    steps = ARRAYS[f"decode{case['seed']}"]
    layers, length = case["L"], case["N"]
    slots = torch.full((layers, steps.shape[2]), -1)
    for layer, kept in enumerate(case["kept"]):
        slots[layer, kept] = torch.tensor(kept)
    protect_from = torch.tensor(
        [kept[-suffix] for kept, suffix in zip(case["kept"], case["suffix"], strict=True)], dtype=torch.int64
    )
    for step, expected in enumerate(case["decode"]):
        slots[:, length + step] = length + step
        protect_from = next_protected(slots, protect_from)
        evicted = choose_eviction(
            steps[:, step],
            slots,
            (slots >= 0).sum(1),
            torch.full((layers,), length + step + 1),
            oracle.rate,
            protect_from,
            config=config,
        )
        for layer, index in enumerate(evicted.tolist()):
            if index >= 0:
                slots[layer, index] = -1
        assert [row[row >= 0].tolist() for row in slots] == expected, f"step {step}"


@pytest.mark.parametrize("shift", [-2, 2])
def test_recorded_cases_notice_a_wrong_budget(shift: int) -> None:
    """The cases discriminate: one token per layer more or less on average fails most of them."""
    wrong = 0
    for case in CASES:
        budget = case["budget"] + shift / case["N"]
        if 0 < budget <= 1:
            oracle = Oracle(EvictionConfig(budget=budget))
            oracle.prefill(ARRAYS[f"attn{case['seed']}"], case_vision(case))
            wrong += oracle.kept != case["kept"]
    assert wrong >= 10
