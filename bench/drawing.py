"""What the pictures share: a colour of each contender, figures without a screen, files."""

from pathlib import Path
from typing import Any

COLOURS = {
    **{"hf-eager": "#7f7f7f", "inductor-full": "#d62728", "inductor-static": "#ff7f0e"},
    **{"tgvkv": "#1f77b4", "tgvkv-capped": "#17becf", "floor": "#2ca02c", "floor-static": "#9467bd"},
}


def subplots(*grid: int, **options: Any) -> Any:
    """`pyplot.subplots`, drawn into files only. matplotlib is imported here: who draws nothing needs none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*grid, constrained_layout=True, **options)


def save(figure: Any, path: Path) -> None:
    """Writes a figure and lets it go."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
