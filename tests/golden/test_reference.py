"""The reference model that the end-to-end tests trust, against the record."""

from typing import Any

import pytest
import torch

from tests.golden.recorded import case_name, cases, check_decoding, load_inputs, load_model, recorded_tokens, some
from tests.support.reference import reference
from tgvkv_compile.config import EvictionConfig

SMALL = [case for case in cases() if case["case"] == "llava-small"]


@pytest.mark.parametrize("case", [*SMALL, *some("llava-576-0.02", "llava-576-0.2")], ids=case_name)
def test_recorded_case(case: dict[str, Any]) -> None:
    model = load_model(case["case"])
    trace = reference(
        model,
        load_inputs(case["case"]),
        len(case["lens"]),
        config=EvictionConfig(case["budget"]),
        image_token=model.config.image_token_id,
        forced=recorded_tokens(case),
    )
    torch.testing.assert_close(trace.masses[0], torch.tensor(case["tv"]), atol=1e-4, rtol=1e-5)
    assert trace.kept[0][0] == case["kept"]
    check_decoding(case, trace.logits, trace.lengths)
