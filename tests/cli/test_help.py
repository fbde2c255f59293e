"""What is there before anything heavy is loaded."""

from pathlib import Path

import pytest

import tgvkv_compile
from tests.cli.command import succeeded, tgvkv

HEAVY = ("torch", "transformers", "matplotlib", "numpy", "PIL")
NOTHING_HEAVY = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["demo", "--help"], ["run", "--help"], ["explain", "--help"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = succeeded(tgvkv(*arguments, cwd=tmp_path, before=NOTHING_HEAVY))
    assert done.out.splitlines()[-1] == "loaded:"
    assert done.err == ""


def test_version_names_what_results_depend_on(tmp_path: Path) -> None:
    out = succeeded(tgvkv("--version", cwd=tmp_path)).out
    assert out.startswith(f"tgvkv-compile {tgvkv_compile.__version__}\n")
    assert tgvkv_compile.__version__ in out.split()
    assert "torch " in out and "transformers " in out


def test_help_has_every_command_and_an_example(tmp_path: Path) -> None:
    out = succeeded(tgvkv("--help", cwd=tmp_path)).out
    for words in ("demo", "run", "explain", "tgvkv run --model ./llava --image cat.jpg"):
        assert words in out


def test_without_arguments_comes_the_help(tmp_path: Path) -> None:
    assert "Usage: tgvkv" in tgvkv(cwd=tmp_path).out
