"""Composing a picture: a grid of scans, one per cell, on white paper or on a colour.

A cell is 14 x 14 pixels, the patch of the vision tower: one digit is one vision token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .scans import MAX_INK, SCAN_SIZE, Scans

GRID = 16
CELL = 14
PICTURE = GRID * CELL
PAPER = (245, 245, 245)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 80, 80),
    "green": (90, 200, 100),
    "blue": (90, 130, 240),
    "yellow": (240, 220, 80),
    "cyan": (80, 215, 225),
    "magenta": (225, 95, 220),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
NO_COLOUR = len(COLOURS)


@dataclass(frozen=True)
class Board:
    """What a picture shows, cell by cell.

    Attributes:
        chosen: `[16, 16]` int64, which scan stands in each cell.
        digits: `[16, 16]` int64, the label of that scan.
        colours: `[16, 16]` int64, index into `COLOUR_NAMES`, or `NO_COLOUR`.
    """

    chosen: npt.NDArray[np.int64]
    digits: npt.NDArray[np.int64]
    colours: npt.NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """The top-left corner of a board: what a question is about, and what the model is shown of the picture.

    Attributes:
        board: The whole board.
        size: Rows and columns shown; 16 is the whole board.
    """

    board: Board
    size: int = GRID

    @property
    def colours(self) -> npt.NDArray[np.int64]:
        """`[size, size]` int64: `Board.colours` of the cells shown."""
        return self.board.colours[: self.size, : self.size]


def random_board(
    rng: np.random.Generator, scans: Scans, *, corner: int = GRID, cells_per_colour: tuple[int, int] = (3, 8)
) -> Board:
    """Draws a board: every cell gets a scan, and every colour some cells of the top-left corner.

    In a corner too small for all the colours, the colours whose turn comes last get what is left.

    Args:
        rng: Source of every choice.
        scans: The scans to choose from, with equal chances.
        corner: Colours fall on the first `corner` rows and columns only; 16 is the whole picture.
        cells_per_colour: Fewest and most cells of one colour, both included, where they fit.
    """
    chosen = rng.integers(0, len(scans), size=(GRID, GRID))
    board = Board(chosen, scans.labels[chosen].astype(np.int64), np.full((GRID, GRID), NO_COLOUR, dtype=np.int64))
    fewest, most = cells_per_colour
    counts = rng.integers(fewest, most + 1, size=len(COLOURS))
    colours = np.repeat(rng.permutation(len(COLOURS)), counts)[: corner * corner]
    cells = rng.permutation(corner * corner)[: len(colours)]
    board.colours[cells // corner, cells % corner] = colours
    return board


def draw(scans: Scans, boards: list[Board], *, jitter: torch.Generator | None = None) -> Tensor:
    """Draws boards as pixels.

    Args:
        scans: The scans that `Board.chosen` counts in.
        boards: `B` boards.
        jitter: If given, every scan is turned, scaled, sheared, shifted, faded and made noisy a little, drawn from
            this generator: training only. Without it the scans stand as they are.

    Returns:
        `[B, 3, 224, 224]` uint8, RGB.
    """
    batch = len(boards)
    chosen = torch.from_numpy(np.stack([board.chosen for board in boards])).flatten()
    ink = torch.from_numpy(scans.images)[chosen].float().unsqueeze(1) / MAX_INK  # [B * 256, 1, 8, 8]
    count = ink.shape[0]
    placement = torch.eye(2, 3).expand(count, 2, 3) if jitter is None else _random_placement(count, jitter)
    where = functional.affine_grid(placement, [count, 1, CELL, CELL], align_corners=False)
    ink = functional.grid_sample(ink, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    if jitter is not None:
        strength = 0.75 + 0.35 * torch.rand(count, 1, 1, 1, generator=jitter)
        speckle = 0.06 * torch.randn(ink.shape, generator=jitter)
        ink = (ink * strength + speckle).clamp(0, 1)
    palette = torch.tensor([*COLOURS.values(), PAPER], dtype=torch.float32)
    colours = torch.from_numpy(np.stack([board.colours for board in boards])).flatten()
    cells = (palette[colours][:, :, None, None] * (1 - ink)).round().to(torch.uint8)  # [B * 256, 3, 14, 14]
    cells = cells.view(batch, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, 3, PICTURE, PICTURE)


def to_image(pixels: Tensor) -> Image.Image:
    """One picture, `[3, 224, 224]` uint8, as a PIL image in RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _random_placement(count: int, jitter: torch.Generator) -> Tensor:
    """`[count, 2, 3]` float32: affine maps near the identity, from cell coordinates to scan coordinates."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=jitter)

    angle = uniform(-math.radians(14), math.radians(14))
    shear = uniform(-0.2, 0.2)
    wide, high = uniform(0.85, 1.15), uniform(0.85, 1.15)
    shift = 1.2 / SCAN_SIZE
    left, up = uniform(-shift, shift), uniform(-shift, shift)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    top = torch.stack([cosine * wide, (shear * cosine - sine) * high, left], dim=1)
    bottom = torch.stack([sine * wide, (shear * sine + cosine) * high, up], dim=1)
    return torch.stack([top, bottom], dim=1)
