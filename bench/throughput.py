"""Tokens per second at the largest batch that fits one card, per contender.

The batch doubles until memory runs out or `--largest` is reached; the best of what fitted counts.

    python -m bench.throughput --preset llava-1.5-7b-16k --json throughput.json
"""

import dataclasses
import sys
from typing import Any

from bench import record, table
from bench.arguments import add_budget, add_compiler, add_files, at_least_one, listed, parser, preset_of
from bench.errors import BenchError, exit_code
from bench.measure import say
from bench.points import Point, measured

CONTENDERS = ["inductor-full", "inductor-static", "tgvkv", "tgvkv-capped"]


def main() -> None:
    """Measures each contender by itself, prints a table, writes JSON where asked to."""
    options = parser(__doc__)
    add_budget(options)
    options.add_argument("--largest", type=at_least_one, default=512, help="batch to stop at")
    options.add_argument("--contenders", type=listed(str), default=CONTENDERS, help="by comma")
    add_compiler(options)
    add_files(options, "json")
    args = options.parse_args()
    preset = preset_of(args)
    if preset.device == "cpu" and args.preset != "tiny":
        raise BenchError(f"preset {args.preset!r} runs on the CPU, where the largest batch is what the system swaps at")
    found: dict[str, Any] = {**record.header("bench.throughput", args.preset, preset), "points": []}
    for name in args.contenders:
        for batch in _doubling(args.largest):
            say(f"{name}, batch {batch}")
            point = Point("batch", preset.context, batch, args.budget)
            one = {"contender": name, **dataclasses.asdict(point), **measured(point, preset, (name,), args.compiler)}
            found["points"].append(one)
            record.write(found, args.json)
            if one["error"] is not None:
                break
    sys.stdout.write(f"{best(found['points'])}\n")


def _doubling(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def best(points: list[dict[str, Any]]) -> str:
    """A markdown table: per contender its most tokens per second, at which batch, and why there was no larger one."""
    lines = []
    for name in dict.fromkeys(point["contender"] for point in points):
        mine = [point for point in points if point["contender"] == name]
        fitted = [point for point in mine if point["error"] is None]
        ended = mine[-1]["error"] or "largest that was asked for"
        top = max(fitted, key=lambda point: point["rows"][name]["tokens_per_s"], default=None)
        said = ["", ""] if top is None else [str(top["batch"]), format(top["rows"][name]["tokens_per_s"], ".1f")]
        lines.append([name, *said, ended])
    return table.markdown(["", "batch", "tokens/s", "ended by"], lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
