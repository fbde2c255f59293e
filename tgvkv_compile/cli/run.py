"""`tgvkv run` and `tgvkv explain`: any model, one question."""

from collections.abc import Sequence
from typing import Any

import torch
import typer
from PIL import Image
from rich.console import Console
from transformers import TextStreamer

from tgvkv_compile.backend.api import compile
from tgvkv_compile.backend.explain import explain
from tgvkv_compile.backend.request import blank_image
from tgvkv_compile.cli.compiling import compiling_shown
from tgvkv_compile.cli.inputs import Loaded, build_inputs
from tgvkv_compile.cli.report import cache_lines
from tgvkv_compile.runtime.inspect import inspect_cache


def answer(
    loaded: Loaded,
    images: Sequence[Image.Image],
    prompt: str,
    budget: float | int | None,
    options: dict[str, Any],
    max_new_tokens: int,
) -> None:
    """Compiles the model, streams its answer and prints what the cache holds.

    Args:
        loaded: The model and its processor.
        images: At least one picture.
        prompt: The question.
        budget: KV kept.
        options: Other options of the backend.
        max_new_tokens: Longest answer.
    """
    inputs = build_inputs(loaded, images, prompt)
    model = compile(loaded.model, budget, **options)
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode(), compiling_shown(Console(stderr=True)):
        result = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            return_dict_in_generate=True,
        )
    typer.echo()
    typer.echo("\n".join(cache_lines(inspect_cache(result))))


def explanation(
    loaded: Loaded, images: Sequence[Image.Image], prompt: str, budget: float | int | None, options: dict[str, Any]
) -> str:
    """What the backend would do with the model, as text; without pictures a blank one is asked about."""
    inputs = build_inputs(loaded, images or [blank_image()], prompt)
    with torch.no_grad():
        return str(explain(loaded.model, dict(inputs), budget=budget, **options))
