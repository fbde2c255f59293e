"""The benchmark on ONNX Runtime: what it compares is what it says."""

import dataclasses
import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from bench import ort
from bench.models import make_model
from bench.presets import PRESETS

TINY = dataclasses.replace(PRESETS["tiny"], layers=1, batch=1, rounds=2, prefill_rounds=1)


def test_full_kv_is_the_stock_models(tmp_path: Path) -> None:
    model = make_model(TINY)
    sample = ort.inputs_of(model, TINY)
    runner = ort.FullCache(model, sample, tmp_path, onnxruntime.SessionOptions())
    expected = model.generate(**sample, max_new_tokens=6, do_sample=False)[:, TINY.context :]
    found = [runner.prefill(sample).argmax(1)]
    for step in range(5):
        found.append(runner.decode(found[-1][:, None], torch.tensor([[TINY.context + step]])).argmax(1))
    assert torch.stack(found, 1).tolist() == expected.tolist()
    assert runner.kv_bytes() == 2 * TINY.kv_heads * TINY.head_dim * 4 * (TINY.context + 5)


def test_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    shape = ["--layers", "1", "--batch", "1", "--rounds", "2", "--prefill-rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ort", "--preset", "tiny", "--budget", "0.2", "--json", str(path), *shape])
    ort.main()
    found = json.loads(path.read_text())
    assert list(found["rows"]) == [ort.FULL, ort.STATIC, ort.OURS]
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    for row in found["rows"].values():
        assert len(row["rounds"]["decode_ms"]) == 2 and len(row["rounds"]["prefill_ms"]) == 1
        assert row["decode_ms"] > 0 and row["kv_bytes"] > 0 and row["file_bytes"] > 0
    assert found["ratios"]["kv_bytes_vs_full"] < 0.5
    assert set(found["ratios"]) >= {"decode_vs_full", "prefill_vs_full", "decode_vs_full_static"}
