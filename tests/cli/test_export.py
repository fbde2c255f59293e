"""`tgvkv export` and `tgvkv run --onnx` on the embedded model."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.cli.command import succeeded, tgvkv
from tests.cli.test_errors import refused
from tgvkv_compile.cli.app import app
from tgvkv_compile.digits import Question, held_out_questions, model_dir
from tgvkv_compile.export import Manifest


@pytest.fixture(scope="module")
def question() -> Question:
    return held_out_questions(3)[2]


@pytest.fixture(scope="module")
def engines(question: Question, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, made as a user makes it; what it printed is in `printed`, the picture in `digits.png` above it."""
    folder = tmp_path_factory.mktemp("export")
    question.image.save(folder / "digits.png")
    given: list[object] = ["--image", "digits.png", "--prompt", question.prompt, "--budget", 0.2, "--max-new-tokens", 16]
    done = succeeded(tgvkv("export", "onnx", "--model", model_dir(), "--out", "engines", *given, cwd=folder))
    (folder / "out").write_text(done.out)
    (folder / "err").write_text(done.err)
    return folder / "engines"


def run(engines: Path, question: Question, *more: object) -> Any:
    asked = ["run", "--onnx", engines, "--image", engines.parent / "digits.png", "--prompt", question.prompt, *more]
    return CliRunner().invoke(app, [str(part) for part in asked])


def test_progress_and_summary(engines: Path) -> None:
    said = (engines.parent / "err").read_text().splitlines()
    assert [line.split("] ")[1] for line in said] == [
        "calibrating: what the layers want of the samples",
        "tracing the prefill",
        "tracing a decode step",
        "rewriting both",
        "exporting the prefill",
        "exporting the decode step",
        "writing prefill.onnx",
        "writing decode.onnx",
    ]
    out = (engines.parent / "out").read_text()
    manifest = Manifest.read(engines)
    assert f"prompts of up to {manifest.max_prompt} tokens with 256 vision tokens" in out
    assert "KV held between steps" in out and "tgvkv run --onnx engines" in out and "trtexec --onnx=engines/prefill.onnx" in out
    names = {"prefill.onnx", "decode.onnx", "weights.data", "manifest.json", "processor"}
    assert {path.name for path in engines.iterdir()} == names


def test_the_answer_of_the_model_itself(engines: Path, question: Question) -> None:
    lines = run(engines, question).stdout.splitlines()
    asked = ("run", "--model", model_dir(), "--image", "digits.png", "--prompt", question.prompt, "--budget", 0.2)
    more = ("--max-new-tokens", 16, "--lowering", "eager")
    expected = succeeded(tgvkv(*asked, *more, cwd=engines.parent)).out.splitlines()
    assert lines[0].strip() == expected[0].strip()
    assert lines[1].startswith("KV cache: 6 layers, ") and "%" in lines[1]


def test_a_shorter_answer(engines: Path, question: Question) -> None:
    whole, short = (run(engines, question, *more).stdout.splitlines()[0] for more in ((), ("--max-new-tokens", "2")))
    assert whole.startswith(short.rstrip()) and len(short) < len(whole)


def test_what_has_no_meaning_beside_engines(engines: Path, question: Question) -> None:
    for more in (("--model", str(model_dir())), ("--budget", "0.2"), ("--lowering", "eager"), ("--trust-remote-code",)):
        result = run(engines, question, *more)
        assert result.exit_code == 2 and f"tgvkv: {more[0]} cannot be given beside --onnx" in result.stderr


def test_prompts_that_do_not_fit(engines: Path, question: Question) -> None:
    long = f"{question.prompt} {'red ' * 40}"
    picture = engines.parent / "digits.png"
    assert "export with max_prompt=" in refused("run", "--onnx", engines, "--image", picture, "--prompt", long)
    beyond = refused("run", "--onnx", engines, "--image", picture, "--prompt", question.prompt, "--max-new-tokens", 17)
    assert "from 1 to 16" in beyond


def test_neither_model_nor_engines(engines: Path) -> None:
    assert "neither --model nor --onnx" in refused("run", "--image", engines.parent / "digits.png", "--prompt", "red ?")


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    asked = ("--image", tmp_path / "grey.png", "--prompt", "red ?")
    assert "there is no" in refused("run", "--onnx", tmp_path / "nowhere", *asked)
    assert "holds files and no export" in refused("export", "onnx", "--model", model_dir(), "--out", tmp_path)
    assert "is a file" in refused("export", "onnx", "--model", model_dir(), "--out", tmp_path / "grey.png")
    assert "no such folder" in refused("export", "onnx", "--model", "./nowhere", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the arguments is told before minutes are spent on loading a model."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tgvkv_compile.cli.inputs.load", fail)


@pytest.mark.usefixtures("unloaded")
def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out(path: Path) -> str:
        return refused("export", "onnx", "--model", model_dir(), "--out", path)

    (tmp_path / "file").write_text("mine")
    assert "file is a file; give a folder" in out(tmp_path / "file")
    assert "file is a file; give a folder" in out(tmp_path / "file" / "new")
    assert f"no such folder: {tmp_path / 'no'}; --out" in out(tmp_path / "no" / "new")
    assert "holds files and no export" in out(tmp_path)

    def read_only(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr("tgvkv_compile.export.staging.tempfile.mkdtemp", read_only)
    for path in (tmp_path / "there", tmp_path / "new"):
        assert "cannot be written to: Read-only file system; give another folder" in out(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to: Permission denied" in refused(
        "export", "onnx", "--model", model_dir(), "--out", tmp_path / "new"
    )


@pytest.mark.usefixtures("unloaded")
def test_a_dtype_that_engines_lack(tmp_path: Path) -> None:
    said = refused("export", "onnx", "--model", model_dir(), "--out", tmp_path / "new", "--dtype", "bfloat16")
    assert "--dtype bfloat16: weights in bfloat16 cannot be exported: ONNX has no convolution in it" in said


def test_weights_in_a_dtype_that_engines_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgvkv_compile.cli import inputs

    def load(name: str, **_: Any) -> Any:
        return real(name, dtype="bfloat16")

    real = inputs.load
    monkeypatch.setattr(inputs, "load", load)
    said = refused("export", "onnx", "--model", model_dir(), "--out", tmp_path / "new", "--dtype", "auto")
    assert "weights in bfloat16 cannot be exported" in said and not (tmp_path / "new").exists()


BROKEN: dict[str, Callable[[Path], object]] = {
    "prefill.onnx": lambda folder: (folder / "prefill.onnx").write_bytes((folder / "prefill.onnx").read_bytes()[:1000]),
    "weights.data": lambda folder: (folder / "weights.data").unlink(),
    "manifest.json": lambda folder: (folder / "manifest.json").write_text("{"),
    "processor": lambda folder: (folder / "processor" / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_exports(name: str, engines: Path, tmp_path: Path, question: Question) -> None:
    broken = Path(shutil.copytree(engines, tmp_path / "engines"))
    BROKEN[name](broken)
    picture = engines.parent / "digits.png"
    done = tgvkv("run", "--onnx", broken, "--image", picture, "--prompt", question.prompt, cwd=tmp_path)
    assert done.code == 2 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("tgvkv: ") and name in line


def test_a_manifest_in_the_place_of_its_folder(engines: Path) -> None:
    picture = engines.parent / "digits.png"
    said = refused("run", "--onnx", engines / "manifest.json", "--image", picture, "--prompt", "digits on red ?")
    assert "manifest.json is a file; give the folder" in said


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    said = refused("export", "tensorrt", "--model", model_dir(), "--out", tmp_path / "new", "--device", "cpu")
    assert "pip install torch-tensorrt tensorrt" in said


def test_help() -> None:
    for command, expected in (("export", ("onnx", "tensorrt")), ("run", ("--onnx",))):
        text = CliRunner().invoke(app, [command, "--help"]).output
        assert all(word in text for word in expected)
