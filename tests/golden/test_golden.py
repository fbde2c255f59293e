"""Parity with the authors' released code: the compiled model, every budget, both models."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.golden.recorded import (
    MARGIN,
    case_name,
    cases,
    check_decoding,
    load_inputs,
    load_model,
    recorded_tokens,
    some,
)
from tests.support.running import run
from tgvkv_compile import inspect_cache, tgvkv_backend


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    yield {name: load_model(name) for name in {case["case"] for case in cases()}}


# One compilation of prefill and decode per budget: the budget is a constant of the prefill graph.
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", cases(), ids=case_name)
def test_recorded_case(case: dict[str, Any], lowering: Any, models: dict[str, Any]) -> None:
    model, inputs = models[case["case"]], load_inputs(case["case"])
    backend = tgvkv_backend(budget=case["budget"], lowering=lowering)
    model.compile(backend=backend)
    # As `generate` calls it: no mask where nothing is padded. The recorded tokens are fed, so that one token that float
    # noise decides differently does not hide the steps after it.
    trace = run(model, inputs, len(case["lens"]), forced=recorded_tokens(case), give_mask=False)

    assert trace.kept[0][0] == case["kept"]
    check_decoding(case, trace.logits, trace.lengths)
    assert inspect_cache(trace.cache).segment_lengths.tolist() == [case["lens"][-1]]
    assert backend.graphs["prefill"] == backend.graphs["decode"] == 1


@pytest.mark.parametrize("case", some("llava-small-0.05", "llava-small-0.5", "llava-576-0.1"), ids=case_name)
def test_generate(case: dict[str, Any], models: dict[str, Any]) -> None:
    model, inputs = models[case["case"]], load_inputs(case["case"])
    model.compile(backend=tgvkv_backend(budget=case["budget"], lowering="eager"))
    output = model.generate(
        **inputs,
        max_new_tokens=len(case["tokens"]),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    gaps = [float(logits[0].topk(2).values.diff().abs()) for logits in output.logits]
    comparable = next((step for step, gap in enumerate(gaps) if gap < MARGIN), len(gaps))
    assert comparable == len(gaps) or case["min_margin"] < 2 * MARGIN
    assert tokens[:comparable] == case["tokens"][:comparable]
    if tokens == case["tokens"]:
        assert inspect_cache(output.past_key_values).segment_lengths.tolist() == [case["lens"][-1]]


def test_the_record_tells_budgets_apart() -> None:
    """Perturbed: another budget than the recorded one must not pass."""
    case, other = some("llava-small-0.2", "llava-small-0.1")
    model = load_model("llava-small")
    model.compile(backend=tgvkv_backend(budget=other["budget"], lowering="eager"))
    trace = run(model, load_inputs("llava-small"), len(case["lens"]), forced=recorded_tokens(case), give_mask=False)
    assert trace.kept[0][0] != case["kept"]
    with pytest.raises(AssertionError):
        check_decoding(case, trace.logits, trace.lengths)
    assert not torch.equal(trace.logits[1], trace.logits[2])
