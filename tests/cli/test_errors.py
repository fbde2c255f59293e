"""What a user gets wrong costs one line and exit code 2."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.cli.command import tgvkv
from tgvkv_compile.cli.app import app
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
    assert "cannot read" in run(model=model_dir(), image=tmp_path)


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


@pytest.mark.parametrize("budget", ["0", "0.0", "1.5", "-0.1", "nan", "much"])
def test_budgets_that_make_no_sense(budget: str, picture: Path) -> None:
    assert "budget" in run(model=model_dir(), image=picture, budget=budget)


def test_no_such_device(picture: Path) -> None:
    assert "--device 'abacus' cannot be used" in run(model=model_dir(), image=picture, device="abacus")


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
