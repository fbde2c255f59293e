"""When each answer was there, from a record of `bench.answers`: a panel per batch size, a line per contender."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import drawing
from bench.processes import WARM


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the picture. A cold contender and its warm one have the same colour; the warm one's line is dashed."""
    points = found["answers"]
    figure, axes = drawing.subplots(1, len(points), figsize=(5.5 * len(points), 5), squeeze=False)
    for panel, point in zip(axes[0], points, strict=True):
        for name, row in point["rows"].items():
            # The line begins where the model is loaded and nothing is answered.
            times = [row["ready_s"], *row["answers_s"]]
            line = "--" if name.endswith(WARM) else "-"
            panel.plot(range(len(times)), times, line, marker=".", label=name, color=drawing.COLOURS[name.removesuffix(WARM)])
        panel.set_xlabel("answers, each about pictures of another size")
        panel.set_ylabel("seconds since the process was started")
        panel.set_title(f"batch {point['batch']}")
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.25)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{found['preset_name']}, {found['preset']['layers']} layers, hidden size {found['preset']['hidden']}")
    drawing.save(figure, path)
