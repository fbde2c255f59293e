"""Packing many questions about one picture into one training sequence.

    before  picture : <cells> | digits on red ? answer : 7 0 3 <eos> | read row r4 ? answer : 1 2 ... <eos> | ...
    after   every question sees the opening, the cells and itself, at the positions it has when asked alone

So a packed question is, to the model, the same as a question asked alone; the cells are computed once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tgvkv_compile.digits.pictures import COLOURS, NO_COLOUR, View
from tgvkv_compile.digits.questions import OPENING, Asked, Kind, about_colour, about_place
from tools.digits.processor_files import BOS, EOS, WORD_IDS, word_ids

NO_TARGET = -100
OPENING_IDS: tuple[int, ...] = (WORD_IDS[BOS], *word_ids(OPENING))
KINDS: tuple[Kind, ...] = ("content", "position")
Mark = Literal["row", "column", "colour", "rank"]
MARKS: tuple[Mark, ...] = ("row", "column", "colour", "rank")
"""What tells one cell from all others: two of these do."""


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences; `Q` is the padded length of the questions of one picture, `N` the whole length.

    Attributes:
        question_ids: `[B, Q]` int64, the questions and answers, without opening and cells.
        targets: `[B, Q]` int64, the token after each token where that is of an answer, else `NO_TARGET`.
        kinds: `[B, Q]` int64, index into `KINDS`.
        positions: `[B, N]` int64.
        visible: `[B, 1, N, N]` bool, true where a query (third dimension) sees a key (fourth).
        ranks: `[B, cells]` int64, how many cells of its own colour come before a cell, `NO_TARGET` if uncoloured.
        wanted: `[B, Q]` int64 each: what marks the cell whose digit comes after a token, `NO_TARGET` where none does. Its
            `row` and `column` for questions by position, its `colour` and `rank` among that colour for those by content.
        cells: `[B, Q]` int64, which cell of the view that is, `NO_TARGET` where no digit comes after a token.
    """

    question_ids: Tensor
    targets: Tensor
    kinds: Tensor
    positions: Tensor
    visible: Tensor
    ranks: Tensor
    wanted: dict[Mark, Tensor]
    cells: Tensor


def draw_questions(rng: np.random.Generator, view: View, count: int) -> list[Asked]:
    """Draws `count` questions about one view: one about each colour that it shows, the rest about places."""
    shown = np.unique(view.colours[view.colours != NO_COLOUR])
    about_colours = [about_colour(view, int(colour)) for colour in shown]
    return about_colours + [about_place(rng, view) for _ in range(count - len(shown))]


def pack(views: list[View], asked: list[list[Asked]]) -> Packed:
    """Packs the questions `asked[b]` about `views[b]`, all of one size; the model sees only the views."""
    lead = len(OPENING_IDS) + views[0].size ** 2
    rows = [_pack_one(view, questions, lead) for view, questions in zip(views, asked, strict=True)]
    longest = max(len(row[0]) for row in rows)
    ids, targets, kinds, places, blocks, cells, *wanted = (
        torch.tensor([row[column] + [padding] * (longest - len(row[column])) for row in rows])
        for column, padding in enumerate((0, NO_TARGET, 0, lead, -1, NO_TARGET, *[NO_TARGET] * len(MARKS)))
    )
    batch = len(views)
    positions = torch.cat([torch.arange(lead).expand(batch, -1), places], dim=1)
    blocks = torch.cat([torch.zeros(batch, lead, dtype=torch.int64), blocks], dim=1)
    same = blocks[:, None, :] == blocks[:, :, None]
    causal = torch.ones(lead + longest, lead + longest, dtype=torch.bool).tril()
    visible = (same | (blocks == 0)[:, None, :]) & causal
    ranks = torch.from_numpy(np.stack([cell_ranks(view) for view in views]))
    return Packed(ids, targets, kinds, positions, visible[:, None], ranks, dict(zip(MARKS, wanted, strict=True)), cells)


def _pack_one(view: View, questions: list[Asked], lead: int) -> list[list[int]]:
    """Ids, targets, kinds, positions, block numbers (from 1), cells and `MARKS` of one picture's questions, end to end."""
    ids: list[int] = []
    targets: list[int] = []
    kinds: list[int] = []
    places: list[int] = []
    blocks: list[int] = []
    cells: list[int] = []
    wanted: dict[Mark, list[int]] = {mark: [] for mark in MARKS}
    for block, question in enumerate(questions, start=1):
        words = word_ids(question.words)
        answer = [*word_ids(question.answer), WORD_IDS[EOS]]
        # <eos> is a target but never an input: nothing comes after it.
        one = words + answer[:-1]
        ids += one
        targets += [NO_TARGET] * (len(words) - 1) + answer
        kinds += [KINDS.index(question.kind)] * len(one)
        places += range(lead, lead + len(one))
        blocks += [block] * len(one)
        silent, end = [NO_TARGET] * (len(words) - 1), [NO_TARGET]
        cells += silent + [row * view.size + column for row, column in question.cells] + end
        marks = _marks(view, question)
        for mark in MARKS:
            wanted[mark] += silent + marks.get(mark, [NO_TARGET] * len(question.cells)) + end
    return [ids, targets, kinds, places, blocks, cells, *wanted.values()]


def _marks(view: View, question: Asked) -> dict[Mark, list[int]]:
    """What marks each cell of the answer, in the terms of the question."""
    if question.kind == "position":
        return {"row": [row for row, _ in question.cells], "column": [column for _, column in question.cells]}
    return {
        "colour": [int(view.colours[cell]) for cell in question.cells],
        "rank": list(range(len(question.cells))),
    }


def cell_ranks(view: View) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """`[cells]` int64: how many cells of its own colour come before a cell, `NO_TARGET` if uncoloured."""
    colours = view.colours.flatten()
    ranks = np.full(len(colours), NO_TARGET, dtype=np.int64)
    for colour in range(len(COLOURS)):
        (cells,) = np.nonzero(colours == colour)
        ranks[cells] = np.arange(len(cells))
    return ranks
