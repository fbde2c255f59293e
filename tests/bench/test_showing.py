"""Records beside each other, as a table and as a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, plot
from bench.errors import exit_code

ROW = {"compile_s": 3.0, "prefill_ms": 20.0, "decode_ms": 4.0, "tokens_per_s": 9.0, "kv_bytes": 2 << 20}


def written(folder: Path, name: str, **changes: Any) -> Path:
    record = {
        "schema": 1,
        "preset_name": "llava-1.5-7b-4k",
        "preset": {"context": 4096, "batch": 2},
        "machine": {"cores": 2},
        "versions": {"torch": "2.13.0"},
        "budget": 0.05,
        "compiler": "inductor",
        "rows": {"inductor-full": ROW, "tgvkv": {**ROW, "decode_ms": 1.0}},
        "ratios": {"decode_vs_full": 0.25},
        **changes,
    }
    path = folder / name
    path.write_text(json.dumps(record))
    return path


def call(main: Any, monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *map(str, args)])
    return exit_code(main)


def test_comparing_says_what_was_not_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(tmp_path, "a.json")
    faster = {"inductor-full": ROW, "tgvkv": {**ROW, "decode_ms": 0.5}}
    after = written(tmp_path, "b.json", machine={"cores": 16}, rows=faster, ratios={"decode_vs_full": 0.125})
    assert call(compare.main, monkeypatch, before, after) == 0
    printed = capsys.readouterr().out
    assert "- machine.cores: 2 / 16" in printed and "versions" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("| tgvkv: decode ms")]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["1.00", "0.50", "0.500"]
    assert "decode_vs_full" in printed


def test_a_picture_per_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    point = {
        "axis": "context",
        "context": 8192,
        "batch": 2,
        "budget": 0.05,
        "rows": {"tgvkv": ROW},
        "ratios": {},
        "error": None,
    }
    scaling = written(tmp_path, "s.json", preset_name="llava-1.5-7b", points=[point])
    other = written(tmp_path, "o.json", preset_name="tiny")
    out = tmp_path / "pictures"
    assert call(plot.main, monkeypatch, written(tmp_path, "a.json"), scaling, other, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["llava-1.5-7b.png", "tiny.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in out.iterdir())
    samples = plot.samples_of(scaling)
    assert [(sample.context, sample.values["decode_ms"]) for sample in samples] == [(8192, 4.0)]


@pytest.mark.parametrize("main", [compare.main, plot.main])
@pytest.mark.parametrize("content", ["", "{}", '{"schema": 0, "rows": {}}', '{"schema": 1, "rows": []}[', None])
def test_what_is_no_record(
    main: Any, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    args = [bad, bad] if main is compare.main else [bad, "--out", tmp_path / "out"]
    assert call(main, monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {bad}: ") and error.count("\n") == 1
