"""From a user's words to what a model takes: budgets, picture files, models, prompts."""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from tgvkv_compile.backend.request import request_of
from tgvkv_compile.cli.problems import CommandError
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError, first_line


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model for inference and its processor; both are stock transformers objects of any class."""

    model: Any
    processor: Any


def read_budget(eviction: dict[str, Any]) -> float | int | None:
    """Takes the budget out of the options of eviction; None where `--memory` is in its place.

    Raises:
        CommandError: It cannot be read, or both were given.
    """
    text = eviction.pop("budget")
    budget = None if text is None else parse_budget(text)
    _check(budget, memory=eviction["memory"])
    return budget


def parse_budget(text: str) -> float | int:
    """Reads `0.05` as a fraction and `64` as tokens per layer.

    Raises:
        ConfigError: It is neither, or out of range.
    """
    text = text.strip()
    try:
        budget = int(text) if text.isdigit() else float(text)
    except ValueError:
        raise CommandError(f"--budget {text!r} is not a number; give 0.05 for a fraction, 64 for tokens per layer") from None
    _check(budget)
    return budget


def _check(budget: float | int | None, **others: Any) -> None:
    """Raises [`CommandError`][] for what `EvictionConfig` refuses."""
    try:
        EvictionConfig(budget, **others)
    except ConfigError as error:
        raise CommandError(str(error)) from None


def parse_budgets(text: str) -> tuple[float | int, ...]:
    """Reads a comma-separated list of budgets; the same one twice counts once."""
    budgets = tuple(dict.fromkeys(parse_budget(part) for part in text.split(",") if part.strip()))
    if not budgets:
        raise CommandError(f"--budgets {text!r} names no budget; give some, such as 1.0,0.5,0.05")
    return budgets


def read_images(paths: Sequence[Path]) -> list[Image.Image]:
    """Opens picture files as RGB.

    Raises:
        CommandError: A file is missing or is not a picture.
    """
    return [_read_image(path) for path in paths]


def _read_image(path: Path) -> Image.Image:
    if path.exists() and not path.is_file():
        raise CommandError(f"cannot read {path}: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image: Image.Image = file.convert("RGB")
                return image
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except UnidentifiedImageError:
        raise CommandError(f"not a picture that can be read: {path}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CommandError(
            f"cannot read {path}: it has more than {Image.MAX_IMAGE_PIXELS} pixels; give a smaller picture"
        ) from None
    except Exception as error:  # each of Pillow's decoders raises what it likes on a file that is broken
        raise CommandError(f"cannot read {path}: {first_line(error)}") from None


def load(name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> Loaded:
    """Loads a vision-language model and its processor for inference.

    Raises:
        CommandError: There is no such model or device, or it is not a vision-language model.
    """
    _check_device(device)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CommandError(f"no such folder: {name}")
        name = str(folder)
    with quiet_transformers():
        try:
            processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                name, trust_remote_code=trust_remote_code
            )
            model: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except Exception as error:  # transformers, tokenizers and safetensors each have their own for a folder that is broken
            raise _not_loaded(name, error) from None
    model.train(False)
    return Loaded(model.to(device), processor)


def _not_loaded(name: str, error: Exception) -> CommandError:
    if "trust_remote_code" in str(error):
        return CommandError(
            f"cannot load model {name!r}: it brings code of its own, which is not run; read that code, and give "
            "--trust-remote-code if you trust it"
        )
    return CommandError(f"cannot load model {name!r}: {first_line(error)}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and warnings that transformers prints while loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_prompt(prompt: str) -> None:
    """Raises [`CommandError`][] for a prompt that asks nothing."""
    if not prompt.strip():
        raise CommandError(f"--prompt {prompt!r} is empty; ask something about the picture")


def build_inputs(loaded: Loaded, images: Sequence[Image.Image], prompt: str) -> Any:
    """What `model.generate` takes, on the model's device and in its type.

    Raises:
        CommandError: The processor cannot make inputs of these pictures and this prompt.
    """
    try:
        inputs = request_of(loaded.processor, images, prompt)
    except ConfigError as error:
        raise CommandError(str(error)) from None
    except (ValueError, TypeError, IndexError) as error:
        raise CommandError(f"{type(loaded.processor).__name__} cannot read this prompt: {first_line(error)}") from None
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion is what torch built without CUDA raises
        raise CommandError(f"--device {name!r} cannot be used here: {first_line(error)}") from None
    if device.type == "meta":
        raise CommandError("--device 'meta' cannot be used here: it holds no numbers")
