"""Questions about a picture, in two kinds, with the answers and the cells that the answers name.

- content: `digits on red ?` names the cells of that colour, in reading order;
- position: `digit at r3 c5 ?`, `read row r4 ?` and `read row r4 from c3 to c9 ?` name cells by their place.

Rows and columns count from 0: `r3 c5` is cell (3, 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .pictures import COLOUR_NAMES, Board, View, draw, random_board, to_image
from .scans import Scans

Kind = Literal["content", "position"]
Cells = tuple[tuple[int, int], ...]

OPENING = "picture :"
"""The words before the picture."""
CLOSING = "? answer :"
"""The words between every question and its answer."""


@dataclass(frozen=True)
class Asked:
    """A question about a board, in words, without the picture.

    Attributes:
        words: The question with `CLOSING`, such as `digits on red ? answer :`.
        answer: The digits, space-separated, such as `7 0 3`.
        kind: Whether the text matches what the cells look like or where they are.
        cells: The (row, column) of each digit of the answer, in the answer's order, counted from 0.
    """

    words: str
    answer: str
    kind: Kind
    cells: Cells


@dataclass(frozen=True)
class Question:
    """A question with its picture, ready for the processor.

    Attributes:
        image: 224 x 224, RGB, 16 x 16 cells.
        prompt: The text for the processor, with one `<image>`.
        answer: The digits, space-separated, as the tokenizer decodes them, without the end token.
        kind: Whether the text matches what the cells look like or where they are.
        cells: The (row, column) of each digit of the answer, in the answer's order, counted from 0.
    """

    image: Image.Image
    prompt: str
    answer: str
    kind: Kind
    cells: Cells


def about_colour(view: View, colour: int) -> Asked:
    """Asks for the digits on one colour, an index into `COLOUR_NAMES`."""
    rows, columns = np.nonzero(view.colours == colour)  # numpy returns them in reading order
    cells = tuple((int(row), int(column)) for row, column in zip(rows, columns, strict=True))
    return _asked(view.board, f"digits on {COLOUR_NAMES[colour]}", "content", cells)


def about_place(rng: np.random.Generator, view: View) -> Asked:
    """Asks for one cell (15 %), a whole row (25 %) or a stretch of a row (60 %) of what is shown."""
    form = rng.random()
    row = int(rng.integers(view.size))
    if form < 0.15:
        column = int(rng.integers(view.size))
        return _asked(view.board, f"digit at r{row} c{column}", "position", ((row, column),))
    if form < 0.40:
        cells = tuple((row, column) for column in range(view.size))
        return _asked(view.board, f"read row r{row}", "position", cells)
    first, last = sorted(int(column) for column in rng.choice(view.size, size=2, replace=False))
    cells = tuple((row, column) for column in range(first, last + 1))
    return _asked(view.board, f"read row r{row} from c{first} to c{last}", "position", cells)


def ask(scans: Scans, count: int, seed: int) -> list[Question]:
    """Draws questions, each about a picture of its own, the kinds alternating, content first.

    Args:
        scans: The scans to compose the pictures from.
        count: How many questions.
        seed: The same seed gives the same questions; a longer list begins with the shorter one.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    questions = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        board = random_board(rng, scans)
        view = View(board)
        asked = about_place(rng, view) if number % 2 else about_colour(view, int(rng.integers(len(COLOUR_NAMES))))
        image = to_image(draw(scans, [board])[0])
        prompt = f"{OPENING} <image> {asked.words}"
        questions.append(Question(image, prompt, asked.answer, asked.kind, asked.cells))
    return questions


def _asked(board: Board, words: str, kind: Kind, cells: Cells) -> Asked:
    answer = " ".join(str(board.digits[cell]) for cell in cells)
    return Asked(f"{words} {CLOSING}", answer, kind, cells)
