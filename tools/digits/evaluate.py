"""Measures the small model on held-out scans: `python -m tools.digits.evaluate [--count 400] [--seed 1]`.

Every question is asked alone, right after its picture, with the full cache. Accuracy is per digit of the answers, by
kind: *teacher-forced* gives the model the right digits so far, *generated* its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from tgvkv_compile.digits.loading import held_out_questions, load_model, load_processor
from tgvkv_compile.digits.questions import Question

BATCH = 20


@dataclass(frozen=True)
class Score:
    """Accuracy of one kind of question, or of all.

    Attributes:
        questions: How many questions.
        digits: How many digits their answers have.
        teacher_forced: Share of digits predicted right after the right digits before them.
        stops: Share of answers after whose last right digit the model predicts `<eos>`.
        generated: Share of digits that `generate` puts in the right place of the answer.
        whole_answers: Share of answers that `generate` gives entirely right, `<eos>` included.
    """

    questions: int
    digits: int
    teacher_forced: float
    stops: float
    generated: float
    whole_answers: float


@dataclass(frozen=True)
class Marked:
    """One question's result: each digit right or not, and whether the model stops where it should."""

    kind: str
    teacher_forced: tuple[bool, ...]
    stops: bool
    generated: tuple[bool, ...]
    whole_answer: bool


def score(model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]) -> dict[str, Score]:
    """Scores the model on `questions`; the keys are `content`, `position` and `all`."""
    marked: list[Marked] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        marked += _mark(batch, teacher_forced(model, processor, batch), generated(model, processor, batch))
    kinds = ("content", "position")
    groups = {kind: [one for one in marked if one.kind == kind] for kind in kinds} | {"all": marked}
    return {name: _summarise(group) for name, group in groups.items() if group}


@torch.no_grad()
def teacher_forced(
    model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]
) -> list[list[str]]:
    """What the model predicts for each token of the right answer and for the end, given the right tokens before it."""
    texts = [f"{question.prompt} {question.answer}" for question in questions]
    inputs = processor(images=[question.image for question in questions], text=texts, padding=True, return_tensors="pt")
    predicted: Tensor = model(**inputs).logits.argmax(-1)  # [B, N]; padding is on the left, so answers end together
    lengths = [len(question.answer.split()) for question in questions]
    return [
        processor.tokenizer.convert_ids_to_tokens(row[-length - 1 :].tolist())
        for row, length in zip(predicted, lengths, strict=True)
    ]


@torch.no_grad()
def generated(model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]) -> list[list[str]]:
    """What `generate` answers, token by token, up to and with `<eos>` if it comes."""
    inputs = processor(
        images=[question.image for question in questions],
        text=[question.prompt for question in questions],
        padding=True,
        return_tensors="pt",
    )
    prompt = inputs["input_ids"].shape[1]
    # The annotations of `generate` exclude its own classes, so it is taken for what it is.
    generate = cast(Callable[..., Tensor], getattr(model, "generate"))  # noqa: B009
    answers = []
    for row in generate(**inputs)[:, prompt:]:
        tokens: list[str] = processor.tokenizer.convert_ids_to_tokens(row.tolist())
        end = processor.tokenizer.eos_token
        answers.append(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    return answers


def _mark(questions: list[Question], forced: list[list[str]], free: list[list[str]]) -> list[Marked]:
    marked = []
    for question, predicted, answer in zip(questions, forced, free, strict=True):
        right = question.answer.split()
        padded = answer + [""] * len(right)
        marked.append(
            Marked(
                kind=question.kind,
                teacher_forced=tuple(one == two for one, two in zip(predicted[:-1], right, strict=True)),
                stops=predicted[-1] == "<eos>",
                generated=tuple(one == two for one, two in zip(padded[: len(right)], right, strict=True)),
                whole_answer=answer == [*right, "<eos>"],
            )
        )
    return marked


def _summarise(marked: list[Marked]) -> Score:
    digits = sum(len(one.teacher_forced) for one in marked)
    return Score(
        questions=len(marked),
        digits=digits,
        teacher_forced=sum(sum(one.teacher_forced) for one in marked) / digits,
        stops=sum(one.stops for one in marked) / len(marked),
        generated=sum(sum(one.generated) for one in marked) / digits,
        whole_answers=sum(one.whole_answer for one in marked) / len(marked),
    )


def main() -> None:
    """The command line: prints the scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.digits.evaluate", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="questions, half of each kind (default: 400)")
    parser.add_argument("--seed", type=int, default=1, help="fixes pictures and questions (default: 1)")
    parser.add_argument("--folder", type=Path, default=None, help="model folder (default: the package's)")
    options = parser.parse_args()
    questions = held_out_questions(options.count, options.seed)
    scores = score(load_model(options.folder), load_processor(options.folder), questions)
    print(json.dumps({name: asdict(one) for name, one in scores.items()}, indent=2))


if __name__ == "__main__":
    main()
