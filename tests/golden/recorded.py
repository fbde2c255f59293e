"""What the authors' released code did on two small models, for several budgets."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

DATA = Path(__file__).parents[1] / "data"
MARGIN = 1e-3
"""A token may differ from the record after logits whose best two are closer than this."""
TOLERANCE = 1e-3


@functools.cache
def cases() -> list[dict[str, Any]]:
    return json.loads((DATA / "model_cases.json").read_text())  # type: ignore[no-any-return]


def case_name(case: dict[str, Any]) -> str:
    return f"{case['case']}-{case['budget']}"


def some(*names: str) -> list[dict[str, Any]]:
    """The cases of these names."""
    return [next(case for case in cases() if case_name(case) == name) for name in names]


def load_model(name: str, attention: str = "sdpa") -> Any:
    model = LlavaForConditionalGeneration.from_pretrained(
        DATA / name, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    ).eval()
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load_inputs(name: str) -> dict[str, Tensor]:
    inputs = load_file(DATA / name / "inputs.safetensors")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def recorded_tokens(case: dict[str, Any]) -> list[Tensor]:
    """As `run(forced=...)` takes them: the last one is not put in any more."""
    return [torch.tensor([token]) for token in case["tokens"][:-1]]


def check_decoding(case: dict[str, Any], logits: list[Tensor], lengths: list[list[list[int]]]) -> None:
    """Holds a run that was fed the recorded tokens against the record, every step of it.

    Args:
        case: The record.
        logits: `[1, vocabulary]` per call.
        lengths: Per call, sample and layer.
    """
    assert len(logits) == len(case["tokens"]) == len(case["logits_head"])
    for step, (found, head, token) in enumerate(zip(logits, case["logits_head"], case["tokens"], strict=True)):
        torch.testing.assert_close(found[0, :8], torch.tensor(head), atol=TOLERANCE, rtol=0, msg=f"step {step}")
        best = found[0].topk(2)
        assert int(best.indices[0]) == token or float(best.values[0] - best.values[1]) < MARGIN, f"step {step}"
    # The record has the lengths after each decode step; right after the prefill it has the positions themselves.
    assert [length for (length,) in lengths[1:]] == case["lens"]
