"""The benchmarks measure what they say, on a preset of two small layers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bandwidth, run, scaling, throughput
from bench.contenders import ORDER, default_names, kept_tokens, make_contenders
from bench.errors import BenchError, exit_code
from bench.memory import Watch, peaks_of_events
from bench.points import OUT_OF_MEMORY, Point, measured
from bench.presets import PRESETS, Preset
from bench.ratios import NEEDED, ratios, spread

QUICK = ["--preset", "tiny", "--compiler", "eager", "--rounds", "2", "--prefill-rounds", "1", "--steps", "1"]
TINY = dataclasses.replace(PRESETS["tiny"], rounds=2, prefill_rounds=1, steps=1)


def call(main: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *args])
    return exit_code(main)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "out.json"
    names = ("inductor-full", "inductor-static", "tgvkv", "tgvkv-capped", "tgvkv-int8", "floor")
    assert call(run.main, monkeypatch, *QUICK, "--budget", "0.2", "--contenders", ",".join(names), "--json", str(file)) == 0
    found = json.loads(file.read_text())
    # All that a figure needs beside it.
    assert {"versions", "machine", "preset", "command", "date"} <= found.keys()
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["cores"] >= 1
    assert "--budget 0.2" in found["command"] and found["preset"]["layers"] == 2
    assert tuple(found["rows"]) == names and set(NEEDED) <= found["ratios"].keys()
    for name, row in found["rows"].items():
        assert row["decode_ms"] > 0 and row["kv_bytes"] > 0 and row["decode_peak_bytes"] > 0
        assert row["compiles_while_timing"] == 0 and len(row["rounds"]["decode_ms"]) == 2
        assert (row["prefill_ms"] is None) == (row["tokens_per_s"] is None) == (name == "floor")
    assert 0.2 < found["ratios"]["int8_kv_bytes_vs_tgvkv"] < 0.5  # of float32, scales and positions counted
    printed = capsys.readouterr().out
    assert "decode_vs_full" in printed and "tgvkv" in printed
    # What a cache holds is measured: a fifth and the reserve; the floor's exactly a fifth and the answer; the rest all.
    token = 2 * TINY.layers * TINY.batch * TINY.kv_heads * TINY.head_dim * 4
    held = {name: (row["kv_bytes"] - row["kv_reserve_bytes"]) / token for name, row in found["rows"].items()}
    assert held["inductor-full"] >= TINY.context and held["inductor-static"] >= TINY.context
    kept = kept_tokens(0.2, TINY.context)
    assert kept <= held["floor"] <= kept + 20
    for name in ("tgvkv", "tgvkv-capped"):
        assert 0.5 * kept <= held[name] <= 1.5 * kept + 20


def test_a_contender_that_does_not_exist() -> None:
    for names, said in (
        (("tgvkv", "vllm"), "no contender 'vllm'"),
        (("tgvkv", "tgvkv"), "name each one once"),
        ((), "at least"),
    ):
        with pytest.raises(BenchError, match=said):
            make_contenders(names, None, TINY, 0.2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--preset", "llava-7b"], "no preset 'llava-7b'; there are tiny"),
        (["--preset", "llava-1.5-7b"], "needs a CUDA device"),
        (["--preset", "tiny", "--budget", "1.5"], "1.5 is not in (0, 1]"),
        (["--preset", "tiny", "--rounds", "0"], "0 is less than 1"),
        (["--preset", "tiny", "--context", "20"], "picture"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "llava-1.5-7b" in args and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert call(run.main, monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(point: Point, _preset: Preset, names: tuple[str, ...], _compiler: str) -> dict[str, Any]:
        return {"rows": {name: {"decode_ms": point.budget} for name in names}, "ratios": {"decode_vs_full": 0.5}, "error": None}

    monkeypatch.setattr(scaling, "measured", found)
    file, text = tmp_path / "out.json", tmp_path / "out.md"
    axes = ["--contexts", "160,320", "--batches", "1", "--budgets", "0.5", "--contenders", "inductor-full,tgvkv"]
    assert call(scaling.main, monkeypatch, *QUICK, *axes, "--json", str(file), "--markdown", str(text)) == 0
    points = json.loads(file.read_text())["points"]
    assert [point["axis"] for point in points] == ["context", "context", "batch", "budget"]
    assert [(point["context"], point["batch"], point["budget"]) for point in points] == [
        *((160, 2, 0.05), (320, 2, 0.05), (160, 1, 0.05), (160, 2, 0.5)),
    ]
    assert text.read_text().count("### By") == 3
    lines = [line for line in text.read_text().splitlines() if " tgvkv " in line]
    assert len(lines) == 4 and all("0.500" in line for line in lines)


def test_a_point_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(preset: Preset) -> Any:
        raise torch.OutOfMemoryError("no room, says the test")

    monkeypatch.setattr("bench.points.make_model", full)
    point = Point("batch", 160, 4, 0.05)
    found = measured(point, TINY, ("tgvkv",), "eager")
    assert found == {"rows": {}, "ratios": {}, "error": OUT_OF_MEMORY}
    rows = {"axis": "batch", "batch": 4, **found}
    assert f"{OUT_OF_MEMORY}" in scaling.markdown({"points": [rows]})


def test_throughput_doubles_until_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(point: Point, _preset: Preset, names: tuple[str, ...], _compiler: str) -> dict[str, Any]:
        if point.batch > (4 if names == ("tgvkv",) else 1):
            return {"rows": {}, "ratios": {}, "error": OUT_OF_MEMORY}
        return {"rows": {names[0]: {"tokens_per_s": 10.0 * point.batch}}, "ratios": {}, "error": None}

    monkeypatch.setattr(throughput, "measured", fits)
    file = tmp_path / "out.json"
    given = ["--preset", "tiny", "--contenders", "inductor-full,tgvkv", "--json", str(file)]
    assert call(throughput.main, monkeypatch, *given) == 0
    points = json.loads(file.read_text())["points"]
    assert [(point["contender"], point["batch"]) for point in points] == [
        *(("inductor-full", batch) for batch in (1, 2)),
        *(("tgvkv", batch) for batch in (1, 2, 4, 8)),
    ]
    lines = throughput.best(points).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[2:]] == [
        ["inductor-full", "1", "10.0"],
        ["tgvkv", "4", "40.0"],
    ]


def test_bandwidth_of_the_decode_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    assert call(bandwidth.main, monkeypatch, "--preset", "tiny", "--rounds", "1", "--budget", "0.5", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    assert found["kept"] == 80 and found["share"] == pytest.approx(found["decode_bytes_per_s"] / found["copy_bytes_per_s"])
    new, state = bandwidth.step_inputs(TINY, 100)
    for _ in range(150):
        torch.ops.tgvkv.decode_step(*new, *state, 0, 0.25, "fixed", 4)
        state.lengths.add_(1)
        assert bool((state.segment_len == 100).all())  # one in, one out


def test_peaks_are_of_what_is_live_in_each_part() -> None:
    def memory(at: float, size: int, device: int = 0) -> dict[str, Any]:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Device Type": device}}

    events = [
        {"name": "decode", "ts": 10.0, "dur": 10.0},
        *(memory(5, 100), memory(12, 50), memory(13, -50), memory(14, 20), memory(15, 1000, device=1), memory(25, 500)),
    ]
    assert peaks_of_events(events, ["decode"]) == {"decode": 150}


def test_a_watch_sees_what_is_allocated() -> None:
    with Watch("cpu") as watch, watch.part("made"):
        kept = torch.ones(1 << 20)
        del kept
        torch.ones(1 << 18)
    assert 4 << 20 <= watch.peaks["made"] < 5 << 20


def test_ratios_and_spread() -> None:
    rows = {
        "inductor-full": {"decode_ms": 4.0, "prefill_ms": 10.0, "tokens_per_s": 2.0},
        "tgvkv": {"decode_ms": 1.0, "prefill_ms": 11.0, "tokens_per_s": 6.0},
        "floor": {"decode_ms": 0.8, "prefill_ms": None},
    }
    found = ratios(rows)
    assert found == pytest.approx(
        {"decode_vs_full": 0.25, "decode_vs_floor": 1.25, "prefill_vs_full": 1.1, "throughput_vs_full": 3.0}
    )
    assert spread([3.0, 1.0, 2.0])["median"] == 2.0 and spread([3.0, 1.0, 2.0])["max"] == 3.0
    assert set(default_names("cpu")) < set(ORDER)
