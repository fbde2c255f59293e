"""Draws docs/what-it-does.png, README's picture: what a cache holds and what is kept (an illustration), and what was measured.

The figures come from `benchmarks/llava-next-cpu.json`. Needs matplotlib; `python docs/make_picture.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray

HERE = Path(__file__).parent
ROWS, COLUMNS = 48, 60
"""Of the drawn picture: 2,880 tokens, as many as the measured prompt has."""
CELL = 8
"""Pixels of a token, the gap to the next one included."""
INK, FAINT, PAPER = "#1b2430", "#5b6675", "#ffffff"
OURS, THEIRS, TEXT, GONE = "#d9480f", "#9aa5b1", "#f08c00", "#e9ecef"
Colours = NDArray[np.float64]


def scene() -> tuple[Colours, NDArray[np.float64]]:
    """A landscape with a balloon, one colour a token, and how much a question about the balloon looks at each token."""
    y, x = np.mgrid[0:ROWS, 0:COLUMNS].astype(float)
    picture = np.stack([0.56 + 0.004 * y, 0.76 + 0.002 * y, 0.93 - 0.001 * y], axis=-1)
    for hill, base, wave, colour in (
        (34.0, 0.16, 5.0, (0.47, 0.63, 0.55)),
        (40.0, 0.11, 3.0, (0.36, 0.55, 0.38)),
    ):
        picture[y > hill + wave * np.sin(base * x + hill)] = colour
    picture[(x - 51) ** 2 + (y - 7) ** 2 < 20] = (0.99, 0.86, 0.42)
    for left, top in ((33, 10), (5, 6)):
        picture[((x - left) / 5.5) ** 2 + ((y - top) / 1.8) ** 2 < 1] = (0.96, 0.97, 0.98)
    balloon = (x - 20) ** 2 + ((y - 16) / 1.12) ** 2 < 36
    picture[balloon] = (0.84, 0.22, 0.24)
    picture[balloon & (np.abs(x - 20) < 1.6)] = (0.98, 0.80, 0.35)
    basket = (np.abs(x - 20) < 2) & (y > 22) & (y < 26)
    picture[basket] = (0.45, 0.29, 0.16)
    looked = np.where(balloon, 1.0, 0.012) + np.where(basket, 0.5, 0.0)
    return picture, looked


def tokens(colours: Colours) -> Colours:
    """Pixels of a grid of tokens, with gaps between them."""
    grown = np.ones((colours.shape[0] * CELL, colours.shape[1] * CELL, 3))
    for row in range(colours.shape[0]):
        for column in range(colours.shape[1]):
            grown[row * CELL : row * CELL + CELL - 1, column * CELL : column * CELL + CELL - 1] = colours[row, column]
    return grown


def shade(name: str) -> tuple[float, ...]:
    """A colour as numbers."""
    return tuple(int(name[start : start + 2], 16) / 255 for start in (1, 3, 5))


def grid(figure: Figure, left: float, colours: Colours, text: int, title: str, below: str) -> Axes:
    """A picture of tokens, the text's in rows of their own beneath."""
    axes = figure.add_axes((left, 0.2, 0.268, 0.6))
    strip = np.ones((4, COLUMNS, 3))
    strip[2:, : text // 2] = shade(TEXT)
    axes.imshow(tokens(np.concatenate([colours, strip])), interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=11.5, fontweight="bold", color=INK, pad=8)
    said = "“What colour is the balloon?”"
    axes.text((text // 2 + 1) * CELL, (ROWS + 3) * CELL, said, va="center", fontsize=8.3, color=TEXT, style="italic")
    axes.text(0.5, -0.03, below, transform=axes.transAxes, ha="center", va="top", fontsize=10, color=FAINT)
    return axes


def bars(figure: Figure, bottom: float, title: str, rows: list[tuple[str, float, str]]) -> None:
    """One quantity of each contender, ours last and in colour."""
    axes = figure.add_axes((0.79, bottom, 0.128, 0.18))
    longest = max(value for _, value, _ in rows)
    for place, (name, value, shown) in enumerate(rows):
        ours = place == len(rows) - 1
        axes.barh(-place, value, height=0.68, color=OURS if ours else THEIRS)
        weight = "bold" if ours else "normal"
        axes.text(-0.03 * longest, -place, name, ha="right", va="center", fontsize=9, color=INK, fontweight=weight)
        axes.text(value + 0.03 * longest, -place, shown, ha="left", va="center", fontsize=9, color=INK, fontweight=weight)
    axes.set_xlim(0, longest)
    axes.set_axis_off()
    axes.text(-1.12, 1.04, title, transform=axes.transAxes, fontsize=11, fontweight="bold", color=INK, va="bottom")


def draw(record: dict[str, Any]) -> Figure:
    """The whole picture."""
    prompt, rows = record["prompt"], record["rows"]
    assert prompt["vision_tokens"] == ROWS * COLUMNS
    text = prompt["tokens"] - prompt["vision_tokens"]
    kept = round(record["budget"] * prompt["tokens"])
    picture, looked = scene()
    chosen = np.random.default_rng(3).choice(looked.size, kept - text, replace=False, p=(looked / looked.sum()).ravel())
    left = np.zeros(looked.size, dtype=bool)
    left[chosen] = True
    thinned = np.where(left.reshape(looked.shape)[..., None], picture, np.array(shade(GONE)))

    figure = Figure(figsize=(10.2, 4.6), facecolor=PAPER)
    figure.text(0.02, 0.925, "A picture is thousands of tokens. A question looks at few of them.", fontsize=16, color=INK)
    said = f"{prompt['tokens']:,} tokens in every layer:\n{prompt['vision_tokens']:,} of the picture, {text} of text"
    grid(figure, 0.02, picture, text, "A full KV cache holds all of them", said)
    budget = f"{record['budget']:.0%}".replace("%", " %")
    said = f"{kept} tokens on average: the text,\nand what it looks at (illustration)"
    grid(figure, 0.328, thinned, text, f"This one holds {budget}", said)
    arrow = FancyArrowPatch((0.288, 0.53), (0.325, 0.53), arrowstyle="simple", mutation_scale=26, color=OURS, lw=0)
    arrow.set_transform(figure.transFigure)
    figure.add_artist(arrow)
    figure.add_artist(Rectangle((0.62, 0.1), 0.001, 0.76, color="#ced4da", lw=0, transform=figure.transFigure))

    names = {"inductor-full": "torch.compile", "inductor-static": "… with StaticCache", "tgvkv": f"tgvkv, {budget}"}
    quantities = (
        (0.645, "KV cache held", lambda row: row["kv_bytes"] / 2**20, "{:.0f} MiB"),
        (0.385, f"One decode step, batch {record['preset']['batch']}", lambda row: row["decode_ms"], "{:.0f} ms"),
        (0.125, "Reading the prompt, batch 1", lambda row: row["prefill_ms"] / 1000, "{:.1f} s"),
    )
    for bottom, title, value, form in quantities:
        measured = [(shown, value(rows[name])) for name, shown in names.items()]
        bars(figure, bottom, title, [(shown, number, form.format(number)) for shown, number in measured])
    model = record["preset"]
    note = (
        f"Measured on {record['machine']['cores']} CPU cores: LLaVA with random weights, {model['layers']} layers, "
        f"hidden size {model['hidden']:,}, float32. Not measured: GPUs, released weights."
    )
    figure.text(0.98, 0.03, note, ha="right", fontsize=9, color=FAINT)
    return figure


if __name__ == "__main__":
    target = HERE / "what-it-does.png"
    record = json.loads((HERE / "benchmarks" / "llava-next-cpu.json").read_text(encoding="utf-8"))
    draw(record).savefig(target, dpi=170, metadata={"Software": None})
    sys.stdout.write(f"wrote {target}\n")
