"""Decode time and memory against context and batch, from records of `bench.run` and `bench.scaling`; answers over time.

One picture per preset: what a point belongs to is read from the records, so several runs may be given at once. Of a record
of `bench.answers`, a picture of its own, named as the file.

    python -m bench.plot scaling.json --out pictures
"""

import dataclasses
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import drawing, plot_answers, record
from bench.arguments import plain_parser
from bench.errors import BenchError, exit_code

PANELS = (("decode_ms", 1.0, "decode step, ms"), ("kv_bytes", 2.0**20, "KV cache, MiB"))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One contender at one point."""

    preset: str
    contender: str
    context: int
    batch: int
    budget: float
    values: dict[str, float]


def main() -> None:
    """Draws the pictures and says where they are."""
    options = plain_parser(__doc__)
    options.add_argument("files", type=Path, nargs="+")
    options.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = options.parse_args()
    answers = {path: found for path in args.files if "answers" in (found := _read(path))}
    samples = [sample for path in args.files if path not in answers for sample in samples_of(path)]
    args.out.mkdir(parents=True, exist_ok=True)
    for file, found in answers.items():
        path = args.out / f"{file.stem}.png"
        plot_answers.draw(found, path)
        sys.stdout.write(f"{path}\n")
    for preset in dict.fromkeys(sample.preset for sample in samples):
        path = args.out / f"{preset}.png"
        draw([sample for sample in samples if sample.preset == preset], preset, path)
        sys.stdout.write(f"{path}\n")


def samples_of(path: Path) -> list[Sample]:
    """What a record holds.

    Raises:
        BenchError: It is no record, or nothing in it was measured.
    """
    found = _read(path)
    preset = re.sub(r"-\d+k$", "", found["preset_name"])
    shape = found["preset"]
    alone = {"context": shape["context"], "batch": shape["batch"], "budget": found.get("budget"), "rows": found.get("rows")}
    samples = []
    for point in found.get("points", [alone]):
        for name, row in point["rows"].items():
            values = {key: row[key] for key, _, _ in PANELS}
            samples.append(Sample(preset, name, point["context"], point["batch"], point["budget"], values))
    if not samples:
        raise BenchError(f"{path}: nothing in it was measured")
    return samples


def _read(path: Path) -> dict[str, Any]:
    return record.read(path, ("rows", "points", "answers"), "bench.run, bench.scaling or bench.answers")


def draw(samples: list[Sample], title: str, path: Path) -> None:
    """Four panels: decode time and KV bytes, against context (at the batch size that has most of them) and against batch."""
    figure, axes = drawing.subplots(2, 2, figsize=(11, 8))
    for column, (axis, other) in enumerate((("context", "batch"), ("batch", "context"))):
        fixed = _most_seen(samples, axis, other)
        here = [sample for sample in samples if getattr(sample, other) == fixed]
        for line, (key, unit, label) in enumerate(PANELS):
            panel = axes[line][column]
            for name, budget in dict.fromkeys((sample.contender, _budget(sample)) for sample in here):
                points: dict[int, list[float]] = {}
                for sample in here:
                    if (sample.contender, _budget(sample)) == (name, budget):
                        points.setdefault(getattr(sample, axis), []).append(sample.values[key] / unit)
                # What keeps everything is measured again beside each budget.
                ordered = sorted((place, statistics.median(values)) for place, values in points.items())
                shown = name if budget is None else f"{name}, {100 * budget:g} %"
                panel.plot(*zip(*ordered, strict=True), marker="o", label=shown, color=_colour(name, budget))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({getattr(sample, axis) for sample in here})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xlabel("tokens of the prompt" if axis == "context" else "samples of the batch")
            panel.set_ylabel(label)
            panel.set_title(f"{other} {fixed}")
            panel.grid(True, which="both", alpha=0.25)
    axes[0][0].legend()
    figure.suptitle(title)
    drawing.save(figure, path)


def _most_seen(samples: list[Sample], axis: str, other: str) -> int:
    """The value of `other` at which `axis` takes the most values."""
    seen: dict[int, set[int]] = {}
    for sample in samples:
        seen.setdefault(getattr(sample, other), set()).add(getattr(sample, axis))
    return max(seen, key=lambda value: (len(seen[value]), -value))


def _budget(sample: Sample) -> float | None:
    """None for contenders that keep everything: they are the same at each budget."""
    return None if sample.contender in ("hf-eager", "inductor-full", "inductor-static") else sample.budget


def _colour(name: str, budget: float | None) -> Any:
    """The contender's colour; small budgets as they are, larger ones nearer to white."""
    from matplotlib import colors

    base = colors.to_rgb(drawing.COLOURS.get(name, "black"))
    paler = 0.0 if budget is None or budget <= 0.05 else min(0.7, 0.25 + 0.5 * budget)
    return tuple(part + (1 - part) * paler for part in base)


if __name__ == "__main__":
    sys.exit(exit_code(main))
