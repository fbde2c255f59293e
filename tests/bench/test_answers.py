"""What is measured of answers over time is what it says."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import answers, crossing, first_answers, photos, plot, processes
from bench.answering import Answers, Task, answer, read_task, written_task
from bench.errors import BenchError, exit_code
from bench.models import IMAGE_TOKEN, make_whole_model

PRESET = answers.preset_of(layers=1, hidden=64)
TASK = Task("hf-eager", PRESET, pictures=2, batch=1, new_tokens=2, budget=0.2, compiler="eager", threads=1)


def call(main: Any, monkeypatch: pytest.MonkeyPatch, *args: Any) -> int:
    monkeypatch.setattr("sys.argv", ["bench", *map(str, args)])
    return exit_code(main)


def test_pictures_are_of_sizes_of_their_own() -> None:
    sizes = photos.grids(photos.MOST)
    assert len(set(sizes)) == photos.MOST and photos.grids(3) == sizes[:3]
    assert min(map(min, sizes)) * 28 == 336 and max(map(max, sizes)) * 28 == 672
    assert len({rows * columns for rows, columns in photos.grids(10)}) == 10  # of other lengths, too
    asked = photos.requests(PRESET, 3, 2)
    lengths = [one["input_ids"].shape[1] for one in asked]
    assert len(set(lengths)) > 1 and bool((asked[0]["attention_mask"][:, -1] == 1).all())
    for one in asked:
        vision = one["image_grid_thw"].prod(1)
        assert vision.tolist() == [4 * int((row == IMAGE_TOKEN).sum()) for row in one["input_ids"]]
        assert one["pixel_values"].shape == (int(vision.sum()), 3 * 2 * 14 * 14)
        assert torch.equal(one["mm_token_type_ids"], (one["input_ids"] == IMAGE_TOKEN).long())
    assert len({tuple(one["image_grid_thw"].flatten().tolist()) for one in asked}) == 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", ["hf-eager", "inductor-full", "tgvkv"])
def test_a_process_answers(way: str, batch: int) -> None:
    task, started = read_task(written_task(dataclasses.replace(TASK, way=way, batch=batch), time.monotonic()))
    found = answer(task, started)
    assert 0 < found.ready_s < found.answers_s[0] < found.answers_s[1] <= time.monotonic() - started
    assert (found.graphs == 0) == (way == "hf-eager")
    assert (found.kinds is None) == (way != "tgvkv")
    if found.kinds is not None:
        assert found.kinds["decode"] == 1 and sum(found.kinds.values()) == found.graphs


def test_the_model_encodes_pictures() -> None:
    model = make_whole_model(PRESET)
    inputs = photos.request(PRESET, [(12, 12)], 0)
    one = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1}).logits
    assert not torch.allclose(one, other)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, whose caches are gone afterwards."""
    caches = []
    run = processes.in_a_process

    def watched(task: Task, cache: Path, limit_s: float) -> Answers:
        assert cache.is_dir()
        caches.append((task.way, cache))
        return run(task, cache, limit_s)

    monkeypatch.setattr(processes, "in_a_process", watched)
    file = tmp_path / "new" / "out.json"
    shape = ["--layers", 1, "--hidden", 64, "--pictures", 2, "--batches", 1, "--new-tokens", 2, "--threads", 1]
    some = ["--compiler", "eager", "--rounds", 1, "--limit", 300, "--contenders", "tgvkv,tgvkv-warm"]
    assert call(answers.main, monkeypatch, *shape, *some, "--json", file, "--markdown", tmp_path / "out.md") == 0
    found = json.loads(file.read_text())
    assert {"versions", "machine", "preset", "command", "date", "budget", "new_tokens"} <= found.keys()
    assert found["pictures"] == [list(size) for size in photos.grids(2)]
    (point,) = found["answers"]
    assert point["batch"] == 1 and list(point["rows"]) == ["tgvkv", "tgvkv-warm"]
    for row in point["rows"].values():
        assert len(row["answers_s"]) == 2 and row["kinds"]["decode"] == 1 and row["first_s"] > 0
    assert [way for way, _ in caches] == ["tgvkv", "tgvkv"] and caches[0][1] == caches[1][1]
    assert not caches[0][1].exists()
    assert (tmp_path / "out.md").read_text().startswith("### Batch 1") and "answer 2 s" in capsys.readouterr().out


def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, Path]]:
    """Processes that take no time; who was started for which batch and depth, with which cache folder."""
    started: list[tuple[str, int, int, Path]] = []

    def quick(task: Task, cache: Path, limit_s: float) -> Answers:
        warm = (task.way, task.batch, task.preset.layers, cache) in started
        started.append((task.way, task.batch, task.preset.layers, cache))
        compile_s = {"hf-eager": 0.0, "inductor-full": 20.0, "tgvkv": 10.0}[task.way] * (0.5 if warm else 1.0)
        pace = {"hf-eager": 4.0, "inductor-full": 2.0, "tgvkv": 1.0}[task.way]
        times = [5.0 + compile_s + pace * (number + 1) for number in range(task.pictures)]
        return Answers(5.0, times, graphs=3, kinds=None)

    monkeypatch.setattr(processes, "in_a_process", quick)
    return started


def test_contenders_take_turns_and_warm_ones_find_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch)
    file = tmp_path / "out.json"
    assert call(answers.main, monkeypatch, "--rounds", 2, "--batches", "1,4", "--pictures", 8, "--json", file) == 0
    order = [way for way, batch, _, _ in started if batch == 4]
    assert order[:5] == ["hf-eager", "inductor-full", "inductor-full", "tgvkv", "tgvkv"]
    assert order[5:] == ["inductor-full", "inductor-full", "tgvkv", "tgvkv", "hf-eager"]
    assert len({cache for _, _, _, cache in started}) == 2 * 2 * 3  # cold is cold in each round
    found = json.loads(file.read_text())
    rows = found["answers"][1]["rows"]
    assert rows["tgvkv"]["first_s"] == 11.0 and rows["tgvkv-warm"]["first_s"] == 6.0
    assert rows["tgvkv"]["answers_s"][-1] == 23.0 and len(rows["tgvkv"]["rounds"]) == 2
    pairs = {(pair["contender"], pair["base"]): pair for pair in found["answers"][0]["pairs"]}
    assert set(pairs) == set(crossing.PAIRS)
    assert pairs["tgvkv", "inductor-full"]["ahead_from"] == 1
    assert pairs["tgvkv", "hf-eager"]["ahead_from"] == 4
    assert pairs["inductor-full", "hf-eager"]["ahead_from"] is None
    assert pairs["inductor-full", "hf-eager"]["ahead_at_pace"] == 10

    pytest.importorskip("matplotlib")
    assert call(plot.main, monkeypatch, file, "--out", tmp_path) == 0
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_the_first_answer_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = fake(monkeypatch)
    file = tmp_path / "out.json"
    assert call(answers.main, monkeypatch, "--first", "--rounds", 1, "--json", file) == 0
    assert {depth for _, _, depth, _ in started} == {4, 8, 24} and "hf-eager" not in {way for way, *_ in started}
    found = json.loads(file.read_text())
    assert [(point["layers"], len(point["rows"]["tgvkv"]["answers_s"])) for point in found["first"]] == [
        (4, 2),
        (8, 2),
        (24, 2),
    ]
    ratios = [(goal["name"], goal["layers"], goal["base_layers"], goal["ratio"], goal["met"]) for goal in found["goals"]]
    assert ratios == [
        ("tgvkv", 24, 4, 1.0, True),
        ("tgvkv", 8, 8, 0.5, True),
        ("tgvkv", 24, 24, 0.5, True),
        ("tgvkv-warm", 8, 8, 0.5, True),
        ("tgvkv-warm", 24, 24, 0.5, True),
    ]
    printed = capsys.readouterr().out
    assert "tgvkv / inductor-full, 8 layers" in printed and "tgvkv-warm, 24 layers / 4 layers" in printed
    rows = {"tgvkv": {"first_s": 9.0}, "inductor-full": {"first_s": 10.0}}
    (goal,) = first_answers.goals([{"layers": 8, "rows": rows}])
    assert goal["ratio"] == 0.9 and not goal["met"]


def test_where_lines_cross() -> None:
    assert crossing.ahead_from([1.0, 2.0], [2.0, 3.0]) == 1
    assert crossing.ahead_from([3.0, 4.0, 5.0], [2.0, 4.0, 6.0]) == 2
    assert crossing.ahead_from([1.0, 4.0], [2.0, 3.0]) is None
    assert crossing.ahead_at_pace([10.0, 11.0, 12.0], [4.0, 6.0, 8.0]) == 7
    assert crossing.ahead_at_pace([10.0, 12.0, 14.0], [4.0, 5.0, 6.0]) is None
    assert crossing.ahead_at_pace([10.0, 11.0], [4.0, 6.0]) is None


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--contenders", "tgvkv-warm"], "'tgvkv-warm' starts with the caches that 'tgvkv' leaves"),
        (["--contenders", "tgvkv,tgvkv"], "name each one once"),
        (["--contenders", "floor"], "no contender 'floor'"),
        (["--hidden", "100"], "--hidden 100 is no multiple of 64"),
        (["--pictures", "144"], "--pictures 144: there are 143 sizes"),
    ],
)
def test_what_cannot_be_run(
    args: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    assert call(answers.main, monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    stop = processes._stop

    def stopped(process: Any) -> None:
        stop(process)
        ended.append(process.pid)

    monkeypatch.setattr(processes, "_stop", stopped)
    with pytest.raises(BenchError, match="hf-eager: not done after 0.5 seconds; give it more with --limit"):
        processes.in_a_process(TASK, tmp_path, 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(ended[0], 0)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="hf-eager: its process ended with code 1: \\w+Error: "):
        processes.in_a_process(dataclasses.replace(TASK, preset=dataclasses.replace(PRESET, hidden=-64)), tmp_path, 100)
