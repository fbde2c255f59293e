"""What a user gets wrong costs one line and exit code 2."""

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.cli.command import tgvkv
from tgvkv_compile.cli.app import app
from tgvkv_compile.cli.inputs import load
from tgvkv_compile.cli.problems import CommandError
from tgvkv_compile.digits import model_dir


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    Image.new("RGB", (32, 32)).save(path)
    return path


def refused(*arguments: object) -> str:
    """The one line that a refused command leaves."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("tgvkv: ")
    return line


def run(*, model: object, image: object, prompt: str = "digits on red ?", **options: object) -> str:
    more = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return refused("run", "--model", model, "--image", image, "--prompt", prompt, *more)


def test_no_such_picture(tmp_path: Path) -> None:
    assert "no such file: nowhere.png" in run(model=model_dir(), image="nowhere.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    assert "it is a folder" in run(model=model_dir(), image=tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """Opening one would wait for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe.png")
    assert "it is not a regular file" in run(model=model_dir(), image=tmp_path / "pipe.png")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"x" * 100, b"%PDF-1.4\n%%EOF", b"\x89PNG\r\n\x1a\n"])
def test_other_kinds_of_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(content)
    assert "not a picture that can be read" in run(model=model_dir(), image=path)


@pytest.mark.parametrize("part", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_truncated_pictures(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    line = run(model=model_dir(), image=path)
    assert "cannot read" in line or "not a picture that can be read" in line


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_pictures_that_would_fill_the_memory(side: int, tmp_path: Path) -> None:
    """Pillow warns of the first and refuses the second; a few bytes of file either way."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    assert "pixels; give a smaller picture" in run(model=model_dir(), image=path)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(prompt: str, picture: Path) -> None:
    assert "is empty; ask something" in run(model=model_dir(), image=picture, prompt=prompt)
    assert "is empty; ask something" in refused("explain", "--model", model_dir(), "--prompt", prompt)


def test_not_a_picture(tmp_path: Path) -> None:
    text = tmp_path / "words.png"
    text.write_text("not a picture")
    assert "not a picture" in run(model=model_dir(), image=text)


def test_no_such_folder(picture: Path) -> None:
    assert "no such folder: ./nowhere" in run(model="./nowhere", image=picture)


def test_no_such_model(picture: Path) -> None:
    assert "cannot load model 'nobody/nothing'" in run(model="nobody/nothing", image=picture)


def test_a_folder_without_a_model(picture: Path) -> None:
    assert "cannot load model" in run(model=picture.parent, image=picture)


def edited(folder: Path, name: str, **values: object) -> None:
    """Changes entries of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])  # type: ignore[func-returns-value]


BROKEN: dict[str, Callable[[Path], object]] = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": cut("model.safetensors", 100_000),
    "empty weights": cut("model.safetensors", 0),
    "pickled weights": pickled,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "truncated tokenizer": cut("tokenizer.json", 500),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "truncated configuration": cut("config.json", 40),
    "a configuration of another kind": lambda folder: (folder / "config.json").write_text("[]"),
    "a model that transformers does not know": lambda folder: edited(folder, "config.json", model_type="frobnicate"),
    "a model that sees no pictures": lambda folder: edited(folder, "config.json", model_type="bert"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


@pytest.mark.parametrize("how", BROKEN)
def test_broken_model_folders(how: str, folder: Path, picture: Path) -> None:
    BROKEN[how](folder)
    assert "cannot load model" in run(model=folder, image=picture)


REMOTE: dict[str, tuple[str, dict[str, object]]] = {
    "model": (
        "config.json",
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}},
    ),
    "processor": ("processor_config.json", {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}),
}


@pytest.mark.parametrize("command", ["run", "explain"])
@pytest.mark.parametrize("part", REMOTE)
def test_code_in_a_model_s_folder_is_not_run(part: str, command: str, folder: Path, picture: Path) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    name, values = REMOTE[part]
    edited(folder, name, **values)
    line = run(model=folder, image=picture) if command == "run" else refused("explain", "--model", folder)
    assert "it brings code of its own, which is not run" in line and "--trust-remote-code" in line
    assert not ran.exists()


def test_code_of_a_tokenizer_is_not_run_either(folder: Path) -> None:
    """transformers may use a tokenizer of its own instead, which is as well."""
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    edited(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    with contextlib.suppress(CommandError):
        load(str(folder))
    assert not ran.exists()


def test_code_in_a_model_s_folder_runs_where_it_is_trusted(folder: Path, picture: Path) -> None:
    """Which shows that the test above would notice."""
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    name, values = REMOTE["model"]
    edited(folder, name, **values)
    CliRunner().invoke(app, ["explain", "--model", str(folder), "--trust-remote-code"])
    assert ran.exists()


@pytest.mark.parametrize("budget", ["0", "0.0", "1.5", "-0.1", "nan", "much"])
def test_budgets_that_make_no_sense(budget: str, picture: Path) -> None:
    assert "budget" in run(model=model_dir(), image=picture, budget=budget)


@pytest.mark.parametrize("device", ["abacus", "", "cuda:99", "meta"])
def test_no_such_device(device: str, picture: Path) -> None:
    assert f"--device {device!r} cannot be used here" in run(model=model_dir(), image=picture, device=device)


def test_more_image_tokens_than_pictures(picture: Path) -> None:
    line = run(model=model_dir(), image=picture, prompt="<image> <image> digits on red ?")
    assert "2 <image> for 1 pictures" in line


@pytest.mark.parametrize("budgets", ["", ",", "1.0,2.0"])
def test_demo_budgets(budgets: str) -> None:
    assert "budget" in refused("demo", "--budgets", budgets)


def test_demo_writes_into_folders_that_are_there() -> None:
    assert "no such folder: nowhere" in refused("demo", "--out", "nowhere/picture.png")


def test_a_user_sees_no_traceback(tmp_path: Path) -> None:
    done = tgvkv("run", "--model", "./nowhere", "--image", "nowhere.png", "--prompt", "?", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (2, "", "tgvkv: no such file: nowhere.png\n")
