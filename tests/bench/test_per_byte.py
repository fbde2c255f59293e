"""Answers per byte of KV, on the small model of the demonstration."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import per_byte
from bench.errors import exit_code

OURS = Path(__file__).parents[2] / "docs" / "benchmarks" / "digits-per-byte.json"


def test_a_record_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--shares", "0.1", "--questions", "4", "--threads", "1", "--json", str(out), "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert exit_code(per_byte.main) == 0
    rows = {row["kv_dtype"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [None, "int8", "int4", "float8_e4m3fn"] and picture.stat().st_size > 1000
    assert rows[None]["tokens"] < rows["int8"]["tokens"] == rows["float8_e4m3fn"]["tokens"] < rows["int4"]["tokens"]
    # Of entries and windows: room for growth is beside it, and positions and the answer's tokens are a little more.
    for row in rows.values():
        assert row["held_bytes"] <= 1.3 * row["memory"] * 4
        assert row["content"]["total"] > 0
    assert "content, int4" in capsys.readouterr().out


def test_four_bits_answer_twice_as_much_at_the_bytes_of_a_twentieth() -> None:
    """What was measured on all questions, in the record that the documentation shows."""
    rows: dict[Any, Any] = {
        row["kv_dtype"]: row for row in json.loads(OURS.read_text(encoding="utf-8"))["rows"] if row["share"] == 0.05
    }
    assert rows["int4"]["content"]["right"] >= 2 * rows[None]["content"]["right"]
    assert rows["int4"]["held_bytes"] <= 1.05 * rows[None]["held_bytes"]
