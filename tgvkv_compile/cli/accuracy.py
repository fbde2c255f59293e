"""Accuracy and memory of one way to run the model, over a set of questions.

The model answers by `generate`, greedily, as a user would run it. An answer's first token comes from the prompt's own
forward pass, before anything is evicted, so only the tokens after it count. Each is compared with the true answer's at
the same place; a token that is missing counts as wrong.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.digits import Question
from tgvkv_compile.runtime.inspect import inspect_cache

BATCH = 100
"""Of 265 tokens or more: so many that most of what a decode step reads is KV, and most of its time goes there."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions that are asked together.

    Attributes:
        inputs: What `generate` takes; every batch of a set has the same shapes, so that compiled graphs serve them all.
        places: Where each question stands in the whole set.
        questions: One per row; rows beyond them repeat others and are not counted.
        answers: Token ids of the true answers.
        new_tokens: Length of the longest one.
    """

    inputs: dict[str, Tensor]
    places: tuple[int, ...]
    questions: tuple[Question, ...]
    answers: tuple[list[int], ...]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many answer tokens after the first were right."""

    right: int
    total: int

    @property
    def share(self) -> float | None:
        """Right ones among all; None where there were none to get right."""
        return self.right / self.total if self.total else None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one way to run the model did with all questions.

    Attributes:
        accuracy: By kind of question: `content`, `position`.
        texts: What was answered, in the order of the questions.
        physical_bytes: What the caches occupied after the answers, all questions together.
        logical_bytes: What the full caches would have.
        reserve_bytes: The part of `physical_bytes` that was free for growth.
        seconds: Of answering all questions, compilation included.
    """

    accuracy: dict[str, Tally]
    texts: tuple[str, ...]
    physical_bytes: int
    logical_bytes: int
    reserve_bytes: int
    seconds: float


def make_batches(processor: Any, questions: Sequence[Question], size: int = BATCH) -> list[Batch]:
    """Splits questions into batches of equal shapes, padded on the left to the longest prompt of all.

    Questions with answers of like length go together, so that few steps are spent on answers that have ended.

    Args:
        processor: Of the model.
        questions: At least one.
        size: Most rows of a batch.
    """
    count = -(-len(questions) // size)
    rows = -(-len(questions) // count)
    answers = [processor.tokenizer(one.answer, add_special_tokens=False).input_ids for one in questions]
    order = sorted(range(len(questions)), key=lambda place: len(answers[place]))
    inputs = processor(
        images=[question.image for question in questions],
        text=[question.prompt for question in questions],
        padding=True,
        return_tensors="pt",
    )
    batches = []
    for start in range(0, len(questions), rows):
        places = tuple(order[start : start + rows])
        filled = list(places) + order[: rows - len(places)]
        batches.append(
            Batch(
                inputs={name: value[filled] for name, value in inputs.items()},
                places=places,
                questions=tuple(questions[place] for place in places),
                answers=tuple(answers[place] for place in places),
                new_tokens=max(len(answers[place]) for place in places),
            )
        )
    return batches


def measure(model: Any, processor: Any, batches: Sequence[Batch], advance: Callable[[int], None]) -> Measured:
    """Asks all questions.

    Args:
        model: Compiled or not.
        processor: Of the model.
        batches: From `make_batches`.
        advance: Told after each batch how many questions were answered.
    """
    begun = time.perf_counter()
    right = {"content": 0, "position": 0}
    total = dict(right)
    texts: dict[int, str] = {}
    held = [0, 0, 0]
    end = processor.tokenizer.eos_token_id
    for batch in batches:
        with torch.inference_mode():
            result = model.generate(
                **batch.inputs,
                do_sample=False,
                max_new_tokens=batch.new_tokens,
                return_dict_in_generate=True,
            )
        report = inspect_cache(result)
        share = len(batch.questions) / report.batch_size
        for index, count in enumerate((report.physical_bytes, report.logical_bytes, report.reserve_bytes)):
            held[index] += round(count * share)
        given = result.sequences[:, batch.inputs["input_ids"].shape[1] :].tolist()
        for place, question, answer, row in zip(batch.places, batch.questions, batch.answers, given, strict=False):
            said = row[: row.index(end)] if end in row else row
            texts[place] = processor.tokenizer.decode(said)
            right[question.kind] += right_after_first(said, answer)
            total[question.kind] += len(answer) - 1
        advance(len(batch.questions))
    return Measured(
        accuracy={kind: Tally(right[kind], total[kind]) for kind in right},
        texts=tuple(texts[place] for place in sorted(texts)),
        physical_bytes=held[0],
        logical_bytes=held[1],
        reserve_bytes=held[2],
        seconds=time.perf_counter() - begun,
    )


def right_after_first(said: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens of an answer, after its first, were said in their places."""
    return sum(one == two for one, two in zip(said[1:], answer[1:], strict=False))
