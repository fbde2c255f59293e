"""Stage 2: teach the first layers of the language model to count the cells of a colour.

`digits on red ?` wants the red cells in reading order, so a cell has to know how many of its colour come before it.
Asked for nothing but answers, the language model is long in finding that out; told the count of every cell of whole
pictures, through a head that is thrown away later, two layers learn it in minutes.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tgvkv_compile.digits.pictures import View, draw, random_board
from tgvkv_compile.digits.scans import Scans
from tools.digits.architecture import WIDTH
from tools.digits.packing import NO_TARGET, OPENING_IDS, cell_ranks
from tools.digits.train_eyes import see

COUNTING_LAYERS = 2
MOST_CELLS = 8
PICTURES_PER_STEP = 16
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100


def build_rank_head() -> nn.Module:
    """Reads the count, 0 to 7, off the hidden states after `COUNTING_LAYERS` layers: `[..., 128]` to `[..., 8]`."""
    return nn.Sequential(nn.RMSNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, MOST_CELLS))


def train_counter(
    model: LlavaForConditionalGeneration,
    rank_head: nn.Module,
    scans: Scans,
    *,
    steps: int,
    rng: np.random.Generator,
    jitter: torch.Generator,
) -> float:
    """Trains the first `COUNTING_LAYERS` layers of the language model of `model` in place, and the head.

    Args:
        model: The model after stage 1.
        rank_head: From `build_rank_head`.
        scans: The training scans.
        steps: How many steps; over the second half of them the learning rate falls linearly to zero.
        rng: Source of the boards.
        jitter: Source of the scans' augmentation.

    Returns:
        Accuracy per coloured cell over the last 50 steps.
    """
    reader = model.model.language_model
    parameters = [*reader.layers[:COUNTING_LAYERS].parameters(), *rank_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    accuracy: deque[float] = deque([0.0], maxlen=50)
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS, 2 * (1 - step / steps))
        boards = [random_board(rng, scans) for _ in range(PICTURES_PER_STEP)]
        targets = torch.from_numpy(np.stack([cell_ranks(View(board)) for board in boards]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            counts = rank_head(_count(model, draw(scans, boards, jitter=jitter))).float()
        loss = functional.cross_entropy(counts.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        accuracy.append((counts.argmax(-1) == targets)[targets != NO_TARGET].float().mean().item())
        if (step + 1) % 100 == 0:
            print(
                f"counter: step {step + 1}, {time.monotonic() - begun:.0f} s, loss {loss.item():.3f}, "
                f"count {100 * sum(accuracy) / len(accuracy):.1f} %",
                flush=True,
            )
    return sum(accuracy) / len(accuracy)


def _count(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The cells' hidden states after `COUNTING_LAYERS` layers, `[B, 256, 128]`."""
    reader = model.model.language_model
    with torch.no_grad():
        opening = reader.embed_tokens(torch.tensor(OPENING_IDS)).expand(len(pixels), -1, -1)
        hidden = torch.cat([opening, see(model, pixels).float()], dim=1)
    rotations = reader.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in reader.layers[:COUNTING_LAYERS]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotations)
    return hidden[:, len(OPENING_IDS) :]
