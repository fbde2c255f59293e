"""Stage 3: teach the language model to find cells and read them out, on a growing corner of the picture.

The vision tower is frozen. The model starts on the top-left corner of the picture, where finding a cell by its text
emerges within minutes, and carries it over to larger corners; started on the whole picture it does not emerge.

Beside the answers it is told the hints of `hints`. They cost a few heads that are thrown away and nothing afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tgvkv_compile.digits.pictures import GRID, View, draw, random_board
from tgvkv_compile.digits.scans import Scans
from tools.digits.architecture import WIDTH
from tools.digits.hints import WANTING_LAYERS, guess_marks, head_logits, mark_directions, told_accuracy, told_loss
from tools.digits.packing import KINDS, NO_TARGET, OPENING_IDS, Packed, draw_questions, pack
from tools.digits.processor_files import EOS, WORD_IDS
from tools.digits.train_counter import COUNTING_LAYERS
from tools.digits.train_eyes import see

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
PASS_MARK = 0.9
SMOOTHING = 0.9
MOST_STEPS = 600
"""A lesson not passed after so many steps is left all the same."""
RANK_WEIGHT = 0.5
WANTING_WEIGHT = 0.25
LOOKING_WEIGHT = 0.1


@dataclass(frozen=True)
class Lesson:
    """One step of the curriculum: the corner shown, how many cells a colour has there, and what a step takes."""

    corner: int
    cells_per_colour: tuple[int, int]
    pictures: int
    questions_per_picture: int


LESSONS: tuple[Lesson, ...] = (
    Lesson(4, (0, 4), 16, 12),
    Lesson(6, (1, 6), 14, 12),
    Lesson(9, (2, 8), 10, 14),
    Lesson(12, (3, 8), 8, 14),
    Lesson(GRID, (3, 8), 8, 14),
)


@dataclass
class Progress:
    """Where stage 3 stands: the lesson, steps, and smoothed accuracy per digit of the answers, by kind."""

    lesson: int = 0
    steps: int = 0
    steps_in_lesson: int = 0
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    lessons_left: list[str] = field(default_factory=list)


def train_reader(
    model: LlavaForConditionalGeneration,
    rank_head: nn.Module,
    scans: Scans,
    *,
    full_steps: int,
    deadline: float,
    rng: np.random.Generator,
    jitter: torch.Generator,
    save: Callable[[], None],
    first_lesson: int = 0,
) -> Progress:
    """Trains the language model of `model` in place.

    Args:
        model: The model after stage 2.
        rank_head: The head of stage 2, which keeps the count in place.
        scans: The training scans.
        full_steps: Steps on the whole picture; over them the learning rate falls linearly to zero.
        deadline: `time.monotonic()` at which to be done. If it comes before `full_steps`, the learning rate falls to
            zero by then, so that what is kept is a finished model.
        rng: Source of boards and questions.
        jitter: Source of the scans' augmentation.
        save: Called every two minutes, to keep what is reached.
        first_lesson: Where in `LESSONS` to begin, for a model that has passed the lessons before.
    """
    reader = model.model.language_model
    parameters = [*reader.parameters(), *model.lm_head.parameters(), *rank_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    directions = mark_directions(model)
    progress = Progress(lesson=first_lesson)
    begun = saved = time.monotonic()
    full_since = begun
    while True:
        if _move_on(progress):
            full_since = time.monotonic()
        finished = 0.0
        if progress.lesson == len(LESSONS) - 1:
            by_clock = (time.monotonic() - full_since) / max(deadline - full_since, 1.0)
            finished = max(progress.steps_in_lesson / full_steps, by_clock)
        if finished >= 1:
            return progress
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (progress.steps + 1) / WARM_UP_STEPS) * (1 - finished)
        lesson = LESSONS[progress.lesson]
        boards = [
            random_board(rng, scans, corner=lesson.corner, cells_per_colour=lesson.cells_per_colour)
            for _ in range(lesson.pictures)
        ]
        views = [View(board, lesson.corner) for board in boards]
        packed = pack(views, [draw_questions(rng, view, lesson.questions_per_picture) for view in views])
        pixels = draw(scans, boards, jitter=jitter)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, ranks, wanting, looking = _answer(model, rank_head, pixels, packed, lesson.corner)
        loss = functional.cross_entropy(logits.flatten(0, 1), packed.targets.flatten(), ignore_index=NO_TARGET)
        guesses = guess_marks(wanting, directions, rank_head)
        loss = loss + RANK_WEIGHT * told_loss(ranks, packed.ranks)
        for mark, guess in guesses.items():
            loss = loss + WANTING_WEIGHT * told_loss(guess, packed.wanted[mark])
        for head in looking.unbind(1):
            loss = loss + LOOKING_WEIGHT * told_loss(head, packed.cells)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _record(progress, logits, packed)
        if progress.steps % 50 == 0:
            counted = told_accuracy(ranks, packed.ranks)
            wants: dict[str, float] = {mark: told_accuracy(guess, packed.wanted[mark]) for mark, guess in guesses.items()}
            wants["cell"] = max(told_accuracy(head, packed.cells) for head in looking.unbind(1))
            print(
                f"reader: step {progress.steps}, {time.monotonic() - begun:.0f} s, {lesson.corner} x {lesson.corner}, "
                f"loss {loss.item():.3f}, count {100 * counted:.0f} %, wants "
                + ", ".join(f"{mark} {100 * value:.0f} %" for mark, value in wants.items())
                + "; answers "
                + ", ".join(f"{kind} {100 * value:.1f} %" for kind, value in progress.accuracy.items()),
                flush=True,
            )
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()


def _answer(
    model: LlavaForConditionalGeneration, rank_head: nn.Module, pixels: Tensor, packed: Packed, corner: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the language model makes of `B` pictures and the questions packed behind them.

    Returns:
        Logits `[B, Q, vocabulary]` for the questions and `[B, cells, 8]` for the counts, float32; the hidden states of
        the questions after `WANTING_LAYERS` layers, `[B, Q, 128]`; and what the next layer's first heads look at, as
        logits `[B, LOOKING_HEADS, Q, cells]` float32.
    """
    reader = model.model.language_model
    batch = len(pixels)
    with torch.no_grad():
        cells = see(model, pixels).view(batch, GRID, GRID, WIDTH)[:, :corner, :corner].reshape(batch, -1, WIDTH)
    opening = reader.embed_tokens(torch.tensor(OPENING_IDS)).expand(batch, -1, -1)
    inputs = torch.cat([opening, cells.float(), reader.embed_tokens(packed.question_ids)], dim=1)
    out = reader(
        inputs_embeds=inputs,
        attention_mask=packed.visible,
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    lead = len(OPENING_IDS) + corner * corner
    ranks = rank_head(out.hidden_states[COUNTING_LAYERS][:, len(OPENING_IDS) : lead])
    logits = model.lm_head(out.last_hidden_state[:, lead:])
    wanting = out.hidden_states[WANTING_LAYERS]
    looking = head_logits(reader, wanting, packed.positions)[:, :, lead:, len(OPENING_IDS) : lead]
    return logits.float(), ranks.float(), wanting[:, lead:], looking.float()


@torch.no_grad()
def _record(progress: Progress, logits: Tensor, packed: Packed) -> None:
    """Adds a step's accuracy per digit; `<eos>` does not count."""
    right = logits.argmax(-1) == packed.targets
    digits = (packed.targets != NO_TARGET) & (packed.targets != WORD_IDS[EOS])
    for number, kind in enumerate(KINDS):
        asked = digits & (packed.kinds == number)
        if bool(asked.any()):
            now = right[asked].float().mean().item()
            progress.accuracy[kind] += max(1 - SMOOTHING, 1 / (progress.steps_in_lesson + 1)) * (now - progress.accuracy[kind])
    progress.steps += 1
    progress.steps_in_lesson += 1


def _move_on(progress: Progress) -> bool:
    """Goes to the next lesson if this one is passed or has lasted too long; true if that is the whole picture."""
    last = len(LESSONS) - 1
    passed = min(progress.accuracy.values()) >= PASS_MARK and progress.steps_in_lesson > 1 / (1 - SMOOTHING)
    if progress.lesson == last or not (passed or progress.steps_in_lesson >= MOST_STEPS):
        return False
    corner = LESSONS[progress.lesson].corner
    how = "passed" if passed else "left unpassed"
    progress.lessons_left.append(f"{corner} x {corner} {how} after {progress.steps_in_lesson} steps")
    print(f"reader: {progress.lessons_left[-1]}", flush=True)
    progress.lesson += 1
    progress.steps_in_lesson = 0
    progress.accuracy = dict.fromkeys(KINDS, 0.0)
    return progress.lesson == last
