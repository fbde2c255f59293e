"""How prefill, decode and memory grow with context, batch and budget.

One of the three varies at a time, the other two are the preset's (and 5 %). Each point is measured as `bench.run` does it,
compiled for itself. A point that does not fit into memory is said to.

    python -m bench.scaling --preset llava-1.5-7b --json scaling.json --markdown scaling.md
    python -m bench.scaling --preset llava-next-cpu --layers 2 --contexts 1024,2048 --batches 1,2 --budgets 0.05,0.5
"""

import dataclasses
import sys
from typing import Any

from bench import record, table
from bench.arguments import add_budget, add_compiler, add_files, at_least_one, fraction, listed, parser, preset_of
from bench.errors import exit_code
from bench.measure import say
from bench.models import pictures_of
from bench.points import Point, at_point, measured
from bench.presets import Preset

CONTEXTS = [1024, 2048, 4096, 8192, 16_384, 32_768]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
BUDGETS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def main() -> None:
    """Measures all points, prints tables, writes JSON and markdown where asked to."""
    options = parser(__doc__)
    add_budget(options, "where the budget does not vary")
    options.add_argument("--contexts", type=listed(at_least_one), default=CONTEXTS, help="tokens of the prompt, by comma")
    options.add_argument("--batches", type=listed(at_least_one), default=BATCHES, help="samples, by comma")
    options.add_argument("--budgets", type=listed(fraction), default=BUDGETS, help="fractions of KV, by comma")
    options.add_argument("--contenders", type=listed(str), default=["inductor-full", "tgvkv", "tgvkv-capped"], help="by comma")
    add_compiler(options)
    add_files(options, "json", "markdown")
    args = options.parse_args()
    preset = preset_of(args)
    points = points_of(preset, args.budget, args.contexts, args.batches, args.budgets)
    for point in points:
        pictures_of(at_point(preset, point))
    found = {**record.header("bench.scaling", args.preset, preset), "compiler": args.compiler, "points": []}
    for number, point in enumerate(points, start=1):
        say(f"point {number} of {len(points)}: {point.context} tokens, batch {point.batch}, budget {point.budget:g}")
        found["points"].append({**dataclasses.asdict(point), **measured(point, preset, tuple(args.contenders), args.compiler)})
        record.write(found, args.json)  # each time: a long run that dies has written what it had
    tables = markdown(found)
    record.write_text(tables, args.markdown)
    sys.stdout.write(f"{tables}\n")


def points_of(preset: Preset, budget: float, contexts: list[int], batches: list[int], budgets: list[float]) -> list[Point]:
    """Along each axis in turn; the same point may be on several, and is measured for each."""
    return [
        *(Point("context", context, preset.batch, budget) for context in contexts),
        *(Point("batch", preset.context, batch, budget) for batch in batches),
        *(Point("budget", preset.context, preset.batch, share) for share in budgets),
    ]


def markdown(found: dict[str, Any]) -> str:
    """A table per axis: each point's contenders, one per line, then the ratios of tgvkv to inductor-full."""
    tables = []
    for axis in ("context", "batch", "budget"):
        lines = [line for point in found["points"] if point["axis"] == axis for line in _lines(point, axis)]
        if lines:
            tables += [
                f"### By {axis}",
                "",
                table.markdown([axis, "", *table.COLUMNS, "decode_vs_full", "prefill_vs_full"], lines),
                "",
            ]
    return "\n".join(tables).rstrip()


def _lines(point: dict[str, Any], axis: str) -> list[list[str]]:
    at = format(point[axis], "g")
    if point["error"] is not None:
        return [[at, point["error"], *([""] * (len(table.COLUMNS) + 2))]]
    lines = []
    for name, row in point["rows"].items():
        worth = [point["ratios"].get(key) if name == "tgvkv" else None for key in ("decode_vs_full", "prefill_vs_full")]
        lines.append([at, name, *table.cells(row), *("" if ratio is None else f"{ratio:.3f}" for ratio in worth)])
    return lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
