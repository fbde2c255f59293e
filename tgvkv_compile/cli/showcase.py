"""One question, looked at closely."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tgvkv_compile.cli.picture import Scene
from tgvkv_compile.cli.report import budget_label
from tgvkv_compile.config import BudgetOf
from tgvkv_compile.digits import Question
from tgvkv_compile.runtime.inspect import CacheReport, inspect_cache

NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Showcase:
    """What came of it.

    Attributes:
        scene: For the picture.
        report: The cache after the answer, of the whole batch; the question is its first sample.
    """

    scene: Scene
    report: CacheReport


def can_compile() -> bool:
    """Whether there is the C++ compiler that Inductor takes on this system."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")) is not None


def show(
    full: Any, model: Any, processor: Any, questions: Sequence[Question], budget: float | int, budget_of: BudgetOf
) -> Showcase:
    """Asks questions, in one batch, of the uncompiled model and of the compiled one.

    Args:
        full: The uncompiled model.
        model: The compiled one.
        processor: Of both.
        questions: The first is looked at. A second one makes a batch of it, which the graphs for batches serve.
        budget: KV kept by `model`.
        budget_of: What `budget` is a fraction of.
    """
    question = questions[0]
    images, texts = [one.image for one in questions], [one.prompt for one in questions]
    inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    everything, result = (_ask(one, inputs, NEW_TOKENS) for one in (full, model))
    prompt = inspect_cache(_ask(model, inputs, 1))
    ids = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]  # kept positions do not count padding either
    vision = (ids == model.config.image_token_id).nonzero().flatten().tolist()
    length = len(ids)
    share = budget / length if isinstance(budget, int) else budget
    text = length - len(vision)
    start = inputs["input_ids"].shape[1]
    said = [processor.tokenizer.decode(one.sequences[0, start:], skip_special_tokens=True) for one in (result, everything)]
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
    return Showcase(scene, inspect_cache(result))


def _ask(model: Any, inputs: dict[str, Any], new_tokens: int) -> Any:
    with torch.inference_mode():
        return model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
