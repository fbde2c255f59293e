"""Loading the small model, its processor and its held-out questions from the package. Nothing here needs a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, ProcessorMixin

from .questions import Question, ask
from .scans import HELD_OUT_FILE, Scans, load_held_out


def model_dir() -> Path:
    """The folder inside the package that `from_pretrained` loads: weights, configurations, tokenizer, model card."""
    return Path(__file__).parent / "assets"


def load_model(
    folder: Path | None = None, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Loads the small model for inference.

    Args:
        folder: Where the model lies; by default the package's own.
        dtype: Type of the weights in memory; they are stored in float32.
        attn_implementation: Attention of the language model and the vision tower, as transformers names it.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: The folder holds no weights.
    """
    folder = _checked(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True, use_safetensors=True
    )
    model.train(False)
    return model


def load_processor(folder: Path | None = None) -> ProcessorMixin:
    """Loads the processor: it expands `<image>` to 256 image tokens and pads batches on the left."""
    processor: ProcessorMixin = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        _checked(folder), local_files_only=True
    )
    return processor


def held_out_questions(count: int, seed: int = 0) -> list[Question]:
    """Draws questions about pictures of scans that the model was never trained on.

    The kinds alternate, content first; every question has a picture of its own.

    Args:
        count: How many questions.
        seed: The same seed gives the same questions; a longer list begins with the shorter one.
    """
    return ask(_held_out(), count, seed)


@cache
def _held_out() -> Scans:
    return load_held_out(model_dir() / HELD_OUT_FILE)


def _checked(folder: Path | None) -> Path:
    folder = model_dir() if folder is None else folder
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no weights at {folder / 'model.safetensors'}: run `make train`, or reinstall")
    return folder
