"""The demonstration's picture: which patches each layer keeps, and how the layers share the budget."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tgvkv_compile.errors import TgvkvError

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes

MOST_PANELS = 8
PATCH = 14  # pixels that a patch is drawn with
DIM = 0.22
NIGHT = np.array([24, 26, 38], dtype=np.float64)
INK, TEXT_COLOUR, VISION_COLOUR, BUDGET_COLOUR = "#20222e", "#8d99ae", "#f28e2b", "#c1121f"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the picture shows.

    Attributes:
        image: The question's picture.
        question: The question without the picture.
        truth: The right answer.
        answer: What the compressed model said.
        full_answer: What the full model said.
        budget: How the budget is told, such as `20 % of all KV`.
        cells: (row, column) of the patches that the right answer names.
        kept: Per layer, the positions kept of the prompt.
        vision: Positions of the image tokens, in the order of the patches.
        prompt_length: N.
        mean_budget: Entries per layer that the budget allows, on average.
    """

    image: Image.Image
    question: str
    truth: str
    answer: str
    full_answer: str
    budget: str
    cells: Sequence[tuple[int, int]]
    kept: Sequence[Sequence[int]]
    vision: Sequence[int]
    prompt_length: int
    mean_budget: float

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return math.isqrt(len(self.vision))

    def kept_patches(self, layer: int) -> npt.NDArray[np.bool_]:
        """`[grid, grid]`: the patches that a layer keeps."""
        kept = np.isin(np.asarray(self.vision), np.asarray(self.kept[layer]))
        return kept.reshape(self.grid, self.grid)


def draw_scene(scene: Scene, path: Path) -> None:
    """Writes the picture.

    Args:
        scene: What it shows.
        path: A file whose suffix matplotlib can write.

    Raises:
        ImportError: matplotlib is not installed.
        TgvkvError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = len(scene.kept)
    shown = sorted({round(step) for step in np.linspace(0, layers - 1, min(layers, MOST_PANELS))})
    columns = -(-len(shown) // 2) if len(shown) > 3 else len(shown)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns + 9.4, 7.6), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.955, f"“{scene.question}”", fontsize=18, weight="bold", color=INK, va="center")
    figure.text(0.02, 0.9, _told(scene), fontsize=13, color=INK, va="center")
    outer = figure.add_gridspec(
        1, 3, width_ratios=(3.9, 2.9 * columns, 4.6), left=0.02, right=0.985, bottom=0.09, top=0.83, wspace=0.16
    )
    _draw_patches(figure.add_subplot(outer[0]), scene, None)
    panels = outer[1].subgridspec(rows, columns, wspace=0.06, hspace=0.16)
    for index, layer in enumerate(shown):
        _draw_patches(figure.add_subplot(panels[index // columns, index % columns]), scene, layer)
    _draw_budget(figure.add_subplot(outer[2]), scene)
    legend = "Bright: patches whose KV the layer keeps after the prompt. Dark: evicted. Framed: patches of the right answer."
    figure.text(0.02, 0.035, legend, fontsize=11, color=INK, va="center")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TgvkvError(f"cannot write the picture {path}: {error}") from None


def _told(scene: Scene) -> str:
    said = "the same" if scene.answer == scene.full_answer else _quoted(scene.full_answer)
    told = (
        f"right answer: {_quoted(scene.truth)}",
        f"with {scene.budget}: {_quoted(scene.answer)}",
        f"with full KV: {said}",
    )
    return "     ".join(told)


def _quoted(text: str) -> str:
    return f"“{text}”" if text else "(nothing)"


def _draw_patches(axes: "Axes", scene: Scene, layer: int | None) -> None:
    """The picture as a layer keeps it; the whole picture for None."""
    from matplotlib.patches import Rectangle

    side = scene.grid
    kept = np.ones((side, side), dtype=np.bool_) if layer is None else scene.kept_patches(layer)
    pixels = np.asarray(scene.image.resize((side * PATCH, side * PATCH)), dtype=np.float64)
    bright = kept.repeat(PATCH, axis=0).repeat(PATCH, axis=1)[:, :, None]
    shown = np.where(bright, pixels, DIM * pixels + (1 - DIM) * NIGHT)
    axes.imshow(shown.round().astype(np.uint8), extent=(0, side, side, 0), interpolation="nearest")
    for row, column in scene.cells:
        for colour, width in (("black", 3.6), ("#fff200", 1.8)):
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=width))
    found = sum(bool(kept[cell]) for cell in scene.cells)
    told = f"layer {layer}: {int(kept.sum())} patches, {found} of {len(scene.cells)} framed"
    title = f"the picture: {side} by {side} patches" if layer is None else told
    axes.set_title(title, fontsize=12 if layer is None else 10, color=INK, pad=4)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_budget(axes: "Axes", scene: Scene) -> None:
    layers = range(len(scene.kept))
    vision = [int(scene.kept_patches(layer).sum()) for layer in layers]
    text = [len(scene.kept[layer]) - vision[layer] for layer in layers]
    totals = [len(kept) for kept in scene.kept]
    style: dict[str, Any] = {"width": 0.72, "edgecolor": "white", "linewidth": 0.8}
    axes.bar(layers, text, color=TEXT_COLOUR, label="text", **style)
    axes.bar(layers, vision, bottom=text, color=VISION_COLOUR, label="vision", **style)
    top = max([*totals, scene.mean_budget])
    label: dict[str, Any] = {"ha": "center", "fontsize": 10}
    for layer in layers:
        for count, middle in ((text[layer], text[layer] / 2), (vision[layer], text[layer] + vision[layer] / 2)):
            if count > 0.05 * top:  # there is room for the number
                axes.text(layer, middle, str(count), va="center", color="white", **label)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(layer, totals[layer] + 0.02 * top, str(totals[layer]), va="bottom", color=INK, bbox=box, zorder=3, **label)
    axes.axhline(
        scene.mean_budget,
        color=BUDGET_COLOUR,
        linestyle="--",
        linewidth=1.6,
        zorder=2,
        label=f"budget: {scene.mean_budget:.1f} on average",
    )
    axes.set_ylim(0, 1.25 * top)
    axes.set_xticks(list(layers))
    axes.set_xlabel("layer", fontsize=11)
    axes.set_ylabel(f"KV entries kept of {scene.prompt_length}", fontsize=11)
    axes.set_title("budget per layer", fontsize=12, color=INK)
    axes.legend(loc="upper center", ncols=3, frameon=False, fontsize=9.5, columnspacing=1.0, handlelength=1.4)
    axes.spines[["top", "right"]].set_visible(False)
