"""One question, compiled and looked at closely."""

import dataclasses
import os
import shutil
import sys
import time
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.cli.picture import Scene
from tgvkv_compile.cli.report import budget_label
from tgvkv_compile.cli.timing import median_step
from tgvkv_compile.config import BudgetOf, DecodeMode, Lowering
from tgvkv_compile.digits import Question
from tgvkv_compile.runtime.inspect import CacheReport, inspect_cache

TIMED_STEPS = 20
NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Showcase:
    """What came of it.

    Attributes:
        scene: For the picture.
        report: The cache after the answer; `full_report` likewise of the uncompiled model.
        first_seconds: The first `generate`, compilation included.
        step_ms: Median time of a decode step afterwards.
        full_step_ms: Likewise of the uncompiled model.
    """

    scene: Scene
    report: CacheReport
    full_report: CacheReport
    first_seconds: float
    step_ms: float
    full_step_ms: float


def can_compile() -> bool:
    """Whether there is the C++ compiler that Inductor takes on this system."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")) is not None


def show(
    model: Any,
    processor: Any,
    question: Question,
    budget: float | int,
    budget_of: BudgetOf,
    lowering: Lowering,
    decode: DecodeMode,
) -> Showcase:
    """Asks one question of the uncompiled model and of the compiled one.

    Args:
        model: Not compiled yet; compiled afterwards.
        processor: Of the model.
        question: The question.
        budget: KV kept.
        budget_of: What `budget` is a fraction of.
        lowering: Compiler.
        decode: What decoding evicts.
    """
    inputs = dict(processor(images=[question.image], text=[question.prompt], return_tensors="pt"))
    full = _ask(model, inputs)
    full_step = median_step(model, inputs, TIMED_STEPS)
    backend = tgvkv_backend(budget, budget_of=budget_of, lowering=lowering, decode=decode, growth_reserve=NEW_TOKENS)
    model.compile(backend=backend)
    begun = time.perf_counter()
    result = _ask(model, inputs)
    first_seconds = time.perf_counter() - begun
    step = median_step(model, inputs, TIMED_STEPS)
    prompt = inspect_cache(_ask(model, inputs, 1))
    ids = inputs["input_ids"][0]
    vision = (ids == model.config.image_token_id).nonzero().flatten().tolist()
    length = len(ids)
    share = budget / length if isinstance(budget, int) else budget
    text = length - len(vision)
    said = [processor.tokenizer.decode(one.sequences[0, length:], skip_special_tokens=True) for one in (result, full)]
    words = question.prompt.split("<image>")[-1].removesuffix("answer :").strip()
    scene = Scene(
        image=question.image,
        question=words,
        truth=question.answer,
        answer=said[0],
        full_answer=said[1],
        budget=f"{budget_label(budget)} of {'all' if budget_of == 'all' else 'the vision'} KV",
        cells=question.cells,
        kept=[prompt.kept_positions(layer).tolist() for layer in range(prompt.num_layers)],
        vision=vision,
        prompt_length=length,
        mean_budget=min(1.0, share) * length if budget_of == "all" else text + min(1.0, share) * len(vision),
    )
    return Showcase(
        scene=scene,
        report=inspect_cache(result),
        full_report=inspect_cache(full),
        first_seconds=first_seconds,
        step_ms=1000 * step,
        full_step_ms=1000 * full_step,
    )


def _ask(model: Any, inputs: dict[str, Tensor], new_tokens: int = NEW_TOKENS) -> Any:
    with torch.inference_mode():
        return model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
