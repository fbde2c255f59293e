"""The demonstration, small: a picture, a table, a JSON file."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.command import Done, succeeded, tgvkv
from tgvkv_compile.backend.explanation import size
from tgvkv_compile.cli.accuracy import make_batches, right_after_first
from tgvkv_compile.cli.picture import Scene, draw_scene
from tgvkv_compile.cli.report import budget_label
from tgvkv_compile.digits import held_out_questions, load_processor

QUESTIONS = 6
WITHOUT_MATPLOTLIB = "import sys\nsys.modules['matplotlib'] = None"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def done(folder: Path) -> Done:
    small = ("--questions", QUESTIONS, "--budgets", "1.0,0.1", "--lowering", "eager", "--json", "results.json")
    return succeeded(tgvkv("demo", *small, cwd=folder))


@pytest.fixture(scope="module")
def results(folder: Path, done: Done) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return loaded


def test_tables_are_printed(done: Done) -> None:
    for words in ("right answer", "full KV", "100 % of all", "10 % of vision", "tokens/s", "tgvkv-demo.png"):
        assert words in done.out
    assert "first answer after" in done.out and "these figures are not Inductor's" in done.out
    assert not done.err  # nobody looks at it: no spinner


def test_picture_is_written(folder: Path, done: Done) -> None:
    with Image.open(folder / "tgvkv-demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 500
        assert len(set(picture.convert("RGB").get_flattened_data())) > 100


def test_json_has_versions_and_machine(results: dict[str, Any]) -> None:
    assert set(results["versions"]) == {"tgvkv-compile", "torch", "transformers", "python"}
    assert results["machine"]["torch_threads"] >= 1
    assert results["settings"]["lowering"] == "eager"


def test_json_has_every_way_to_run(results: dict[str, Any]) -> None:
    ways = [(row["budget"], row["budget_of"]) for row in results["rows"]]
    assert ways == [(None, None), (1.0, "all"), (0.1, "all"), (0.1, "vision")]
    for row in results["rows"]:
        accuracy = row["accuracy_after_first"]
        assert set(accuracy) == {"content", "position"}
        assert all(0 <= kind["right"] <= kind["total"] for kind in accuracy.values())
    answers = results["questions"][0]["answers"]
    assert set(answers) == {"full KV", "100 % of all", "10 % of all", "10 % of vision"}


def test_json_has_the_speed_of_all_contenders_on_one_batch(results: dict[str, Any]) -> None:
    uncompiled, full, ours = results["speed"]["contenders"]
    assert [one["compiled"] for one in (uncompiled, full, ours)] == [False, True, True]
    assert (full["budget"], ours["budget"], ours["budget_of"]) == (None, 0.1, "all")
    for one in (uncompiled, full, ours):
        assert one["batch"] == QUESTIONS
        assert one["tokens_per_second"] == pytest.approx(1000 * QUESTIONS / one["step_ms"])
        assert 1000 * one["answer_seconds"] > one["prompt_ms"] > 0
    for one in (full, ours):
        assert one["first_answer_seconds"] > 2 * one["answer_seconds"]  # compilation is in no other figure
    assert ours["physical_bytes"] < full["physical_bytes"] / 2 == uncompiled["physical_bytes"] / 2
    assert len(results["speed"]["verdicts"]) == 1


def test_the_whole_budget_answers_as_the_full_cache(results: dict[str, Any]) -> None:
    full, *others = results["rows"]
    for row in others:
        if row["budget"] == 1.0:
            assert row["same_answers_as_full"] == QUESTIONS
            assert row["accuracy_after_first"] == full["accuracy_after_first"]


def test_smaller_budgets_hold_fewer_bytes(results: dict[str, Any]) -> None:
    full, all_kept, tenth, tenth_of_vision = (row["physical_bytes"] for row in results["rows"])
    assert tenth < tenth_of_vision < full / 2
    assert full < all_kept < 1.2 * full


def test_the_picture_shows_what_was_kept(results: dict[str, Any]) -> None:
    shown = results["showcase"]
    assert len(shown["kept_per_layer"]) == 6
    for kept, patches in zip(shown["kept_per_layer"], shown["kept_patches_per_layer"], strict=True):
        assert 0 <= patches <= kept <= shown["prompt_tokens"]
    assert sum(shown["kept_per_layer"]) <= 6 * (0.1 * shown["prompt_tokens"] + 6)


def test_without_matplotlib_the_rest_still_runs(tmp_path: Path) -> None:
    small = ("--questions", 2, "--budgets", "0.1", "--budget-of", "all", "--lowering", "eager")
    done = succeeded(tgvkv("demo", *small, cwd=tmp_path, before=WITHOUT_MATPLOTLIB))
    (line,) = [line for line in done.out.splitlines() if "matplotlib" in line]
    assert "pip install 'tgvkv-compile[plot]'" in line
    assert "10 % of all" in done.out
    assert not list(tmp_path.iterdir())


def test_only_tokens_after_the_first_count() -> None:
    assert right_after_first([7, 1, 2], [9, 1, 2]) == 2
    assert right_after_first([9, 1], [9, 1, 2]) == 1
    assert right_after_first([9, 2, 1, 5], [9, 1, 2]) == 0
    assert right_after_first([], [9, 1, 2]) == 0
    assert right_after_first([9], [9]) == 0


def test_batches_share_one_shape_and_hold_every_question_once() -> None:
    questions = held_out_questions(7)
    batches = make_batches(load_processor(), questions, size=3)
    assert len({tuple(batch.inputs["input_ids"].shape) for batch in batches}) == 1
    assert sorted(place for batch in batches for place in batch.places) == list(range(7))
    for batch in batches:
        assert batch.new_tokens == max(len(question.answer.split()) for question in batch.questions)
        assert [questions[place] for place in batch.places] == list(batch.questions)


@pytest.mark.parametrize("layers", [1, 3, 8, 28])
def test_pictures_of_any_depth(layers: int, tmp_path: Path) -> None:
    scene = Scene(
        image=Image.new("RGB", (64, 64), "white"),
        question="digits on red ?",
        truth="1 2",
        answer="1 3",
        full_answer="1 2",
        budget="20 % of all KV",
        cells=[(0, 1), (3, 3)],
        kept=[[0, 1, 2, 5, 16]] * layers,
        vision=range(1, 17),
        prompt_length=20,
        mean_budget=4.0,
    )
    draw_scene(scene, tmp_path / "scene.png")
    assert (tmp_path / "scene.png").stat().st_size > 10_000
    kept = scene.kept_patches(0)
    assert kept.sum() == 4
    assert kept[0, 0] and kept[0, 1] and kept[1, 0] and kept[3, 3]


def test_labels() -> None:
    assert [budget_label(budget) for budget in (None, 0.05, 1.0, 64)] == ["full", "5 %", "100 %", "64 tokens"]
    assert [size(count) for count in (12, 2048, 3 * 2**20)] == ["12 B", "2.0 KiB", "3.0 MiB"]
