"""Stage 1: teach the vision tower and the projector to see, one cell at a time.

Heads predict digit, row, column and colour of each cell from the projector's output. They only compare directions, at
a fixed length, as attention in the language model will: so the features spend enough of their length on each of the
four, and tell all sixteen rows apart equally well. (With free linear heads most rows differ in directions too faint for
attention to use.) The heads are thrown away, but for their directions: the word `red` starts in the language model as
the direction of red cells, so that what the model learns about one row or colour holds for the others.

Afterwards the tower is frozen: training it together with the language model from scratch stays at chance, and
unfreezing it later destroys what both have learned.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tgvkv_compile.digits.pictures import COLOUR_NAMES, COLOURS, GRID, Board, draw, random_board
from tgvkv_compile.digits.scans import Scans
from tools.digits.architecture import WIDTH
from tools.digits.processor_files import PIXEL_MEAN, PIXEL_STD, WORD_IDS

PICTURES_PER_STEP = 8
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 50
FEATURE_RMS = 4.0
"""Size at which image tokens and words enter the language model: its fresh layers write 5 to 15 on top."""


@dataclass(frozen=True)
class EyesReport:
    """What stage 1 reached: steps taken, seconds, and accuracy per cell over the last 50 steps."""

    steps: int
    seconds: float
    accuracy: dict[str, float]


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The projector's output: pixels `[B, 3, 224, 224]` uint8 to features `[B, 256, 128]`.

    Scales the pixels exactly as the processor does.
    """
    scaled = (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD
    seen = model.model.vision_tower(scaled, output_hidden_states=True).hidden_states[-1]
    features: Tensor = model.model.multi_modal_projector(seen[:, 1:])
    return features


def train_eyes(
    model: LlavaForConditionalGeneration,
    scans: Scans,
    *,
    steps: int,
    rng: np.random.Generator,
    jitter: torch.Generator,
) -> EyesReport:
    """Trains the vision tower and the projector of `model` in place.

    Then scales the features to `FEATURE_RMS`, and gives the words for what is seen their embeddings.

    Args:
        model: The fresh model.
        scans: The training scans.
        steps: How many steps; the learning rate falls to zero at their end.
        rng: Source of the boards.
        jitter: Source of the scans' augmentation.
    """
    sizes = {"digit": 10, "row": GRID, "column": GRID, "colour": len(COLOURS) + 1}
    heads = nn.ParameterDict({name: torch.randn(size, WIDTH) for name, size in sizes.items()})
    parameters = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        *heads.parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    place = torch.arange(GRID * GRID).expand(PICTURES_PER_STEP, -1)
    begun = time.monotonic()
    history: list[dict[str, float]] = []
    for step in range(steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        boards = [_crowded_board(rng, scans) for _ in range(PICTURES_PER_STEP)]
        targets = {
            "digit": torch.from_numpy(np.stack([board.digits for board in boards])).flatten(1),
            "row": place // GRID,
            "column": place % GRID,
            "colour": torch.from_numpy(np.stack([board.colours for board in boards])).flatten(1),
        }
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = see(model, draw(scans, boards, jitter=jitter)).float()
        features = functional.rms_norm(features, (WIDTH,))
        logits = {name: features @ functional.normalize(head, dim=1).T for name, head in heads.items()}
        loss = sum(
            (functional.cross_entropy(logits[name].flatten(0, 1), targets[name].flatten()) for name in sizes),
            torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append({name: (logits[name].argmax(-1) == targets[name]).float().mean().item() for name in sizes})
        if (step + 1) % 100 == 0:
            print(
                f"eyes: step {step + 1}, {time.monotonic() - begun:.0f} s, {_describe(_mean(history[-50:]))}",
                flush=True,
            )
    _name_what_is_seen(model, heads)
    _scale_features(model, draw(scans, [random_board(rng, scans) for _ in range(PICTURES_PER_STEP)], jitter=jitter))
    return EyesReport(len(history), time.monotonic() - begun, _mean(history[-50:]))


def _crowded_board(rng: np.random.Generator, scans: Scans) -> Board:
    """A board with many coloured cells: the usual ones show too few to learn the colours quickly."""
    return random_board(rng, scans, cells_per_colour=(3, 30))


@torch.no_grad()
def _scale_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> None:
    """Folds a scale into the projector, so that what a cell shows is not drowned by what the layers write."""
    scale = see(model, pixels).pow(2).mean().sqrt() / FEATURE_RMS
    model.model.multi_modal_projector.linear_2.weight.div_(scale)
    model.model.multi_modal_projector.linear_2.bias.div_(scale)


@torch.no_grad()
def _name_what_is_seen(model: LlavaForConditionalGeneration, heads: nn.ParameterDict) -> None:
    """Embeds the words for digits, rows, columns and colours as their heads' directions, the others at random."""
    words = {
        "digit": [str(digit) for digit in range(10)],
        "row": [f"r{row}" for row in range(GRID)],
        "column": [f"c{column}" for column in range(GRID)],
        "colour": list(COLOUR_NAMES),
    }
    embedding = model.model.language_model.embed_tokens.weight
    embedding.normal_(std=FEATURE_RMS)
    for kind, names in words.items():
        directions = functional.rms_norm(heads[kind], (WIDTH,)) * FEATURE_RMS
        for name, direction in zip(names, directions, strict=False):  # the last colour is none, and has no word
            embedding[WORD_IDS[name]] = direction


def _mean(history: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}


def _describe(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracy.items())
