"""Options that several of the programs share."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench.errors import BenchError
from bench.models import pictures_of
from bench.presets import PRESETS, Preset


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the programs do."""

    def error(self, message: str) -> NoReturn:
        """Raises `BenchError`."""
        raise BenchError(f"{message} (see --help)")


def plain_parser(doc: str | None) -> Parser:
    """A parser without options; its help is the text as it stands."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser(doc: str | None) -> Parser:
    """A parser with what all presets can be changed in."""
    made = plain_parser(doc)
    made.add_argument("--preset", default="llava-next-cpu", help=f"one of {', '.join(PRESETS)}")
    made.add_argument("--threads", type=at_least_one, help="torch's threads (2 on a CPU)")
    for name, what in (
        ("layers", "decoder layers; a preset with fewer of them is a quick one"),
        ("context", "tokens of the prompt"),
        ("batch", "samples of decode"),
        ("prefill-batch", "samples of prefill"),
        ("rounds", "timed rounds of decode"),
        ("steps", "decode steps of a round"),
        ("prefill-rounds", "timed rounds of prefill"),
    ):
        made.add_argument(f"--{name}", type=at_least_one, help=what)
    return made


def add_compiler(options: Parser) -> None:
    """What graphs are lowered to."""
    options.add_argument(
        "--compiler", choices=["inductor", "eager"], default="inductor", help="eager: only to see that it runs"
    )


def add_budget(options: Parser, what: str = "fraction of KV that tgvkv keeps") -> None:
    """How much is kept; `what` says of what."""
    options.add_argument("--budget", type=fraction, default=0.05, help=what)


def add_files(options: Parser, *kinds: str) -> None:
    """Files to write, one option for each kind (`json`, `markdown`)."""
    for kind in kinds:
        options.add_argument(f"--{kind}", type=Path, help="file to write")


def preset_of(args: Any) -> Preset:
    """The preset that was asked for, with what was changed; sets torch's threads.

    Raises:
        BenchError: There is none of this name, its device is missing, or a prompt has no place for a picture.
    """
    if args.preset not in PRESETS:
        raise BenchError(f"no preset {args.preset!r}; there are {', '.join(PRESETS)}")
    names = ("layers", "context", "batch", "prefill_batch", "rounds", "steps", "prefill_rounds")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    preset = dataclasses.replace(PRESETS[args.preset], **given)
    pictures_of(preset)
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"preset {args.preset!r} needs a CUDA device, and torch finds none; llava-next-cpu needs none")
    if preset.device == "cpu" or args.threads is not None:
        torch.set_num_threads(args.threads or 2)
    return preset


def at_least_one(text: str) -> int:
    """An int >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def fraction(text: str) -> float:
    """A float in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma-separated values."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return read
