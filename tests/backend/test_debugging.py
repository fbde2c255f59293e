"""`TORCH_LOGS`, graph dumps, `stop_after`, `TORCH_TRACE`."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.passes.decoder import Decoder, features, tokens
from tests.runtime.requests import compiled, prefill, step
from tgvkv_compile.pipeline import STEPS
from tgvkv_compile.runtime.logical import LogicalKV

ROOT = Path(__file__).parents[2]
PREFILL = [
    *("traced", "materialise_masks", "normalise_attention"),
    *("insert_scoring", "insert_capping", "insert_budgeting", "insert_eviction"),
]

SCRIPT = """
import tests.runtime.requests as r
model = r.compiled()
caches = r.prefill(model)
r.step(model, caches)
"""


def logged(**environment: str) -> str:
    """What a process with a prefill and a step says."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TORCH_LOGS", "TORCH_TRACE")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torch_logs_with_plus_shows_every_graph() -> None:
    said = logged(TORCH_LOGS="+tgvkv_compile")
    assert "prefill graph: vision tokens merged, empty cache (2 attention sites)" in said
    assert "decode graph: one query on a compressed cache (2 attention sites)" in said
    for step_name in PREFILL:
        assert f"prefill graph after {step_name}:" in said
    assert "decode graph after insert_decode:" in said
    assert "tgvkv_start_1" in said and "tgvkv_key_arena" in said
    assert "compiled a prefill graph of 2 layers in" in said


def test_torch_logs_without_plus_shows_the_decisions_only() -> None:
    said = logged(TORCH_LOGS="tgvkv_compile")
    assert "prefill graph: vision tokens merged" in said
    assert "graph after" not in said


def test_silence_without_torch_logs() -> None:
    said = logged()
    assert "graph" not in said


def test_torch_trace_holds_the_graphs(tmp_path: Path) -> None:
    logged(TORCH_TRACE=str(tmp_path))
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "tgvkv_prefill_insert_eviction" in text and "tgvkv_decode_insert_decode" in text


def test_a_dump_folder_gets_every_graph_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "graphs"
    model = compiled(dump_graphs=str(folder))
    step(model, prefill(model))
    names = sorted(file.name for file in folder.iterdir())
    expected = [f"{i:03d}-prefill-{step}.py" for i, step in enumerate(PREFILL)]
    expected += [f"{i:03d}-decode-{step}.py" for i, step in enumerate(["traced", "insert_decode"], start=len(PREFILL))]
    assert names == expected
    texts = {name: (folder / name).read_text() for name in names}
    assert all("class GraphModule" in text or "def forward" in text for text in texts.values())
    scored = PREFILL.index("insert_scoring")
    assert "rank_tokens" not in texts[names[scored - 1]] and "rank_tokens" in texts[names[scored]]
    assert "decode_step" in texts[names[-1]] and "decode_step" not in texts[names[-2]]


@pytest.mark.parametrize("name", dict.fromkeys(step.name for steps in STEPS.values() for step in steps))
def test_stop_after(name: str, tmp_path: Path) -> None:
    model = compiled(stop_after=name, dump_graphs=str(tmp_path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        caches = prefill(model)
        logits, _ = step(model, caches)
    assert not isinstance(caches[0][0], LogicalKV)
    plain = Decoder()
    with torch.no_grad():
        _, full = plain(tokens(), features())
    torch.testing.assert_close(logits, step(plain, full)[0])
    ours = [str(warning.message) for warning in told if "tgvkv" in str(warning.message)]
    assert ours == [f"tgvkv: stop_after={name!r}: graphs are rewritten for inspection, the model runs uncompressed"]
    dumped = [file.stem.split("-", 2)[1:] for file in sorted(tmp_path.iterdir())]
    last = PREFILL.index(name) if name in PREFILL else len(PREFILL) - 1
    assert dumped == [["prefill", step] for step in PREFILL[: last + 1]]
