"""What users feel: N pictures of N sizes, from the start of a process to each answer; with --first, what the first takes.

Each contender runs in a process of its own, on caches in a temporary folder; `-warm` is a new process on the folder that
the one before it left. Contenders take turns; medians.

    python -m bench.answers --json answers.json --markdown answers.md
    python -m bench.answers --first --depths 4,8,24 --json first.json
    python -m bench.answers --layers 2 --hidden 64 --pictures 3 --batches 1 --rounds 1      # to see that it runs
"""

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench import first_answers, record, table
from bench.answering import Answers, Task
from bench.arguments import Parser, add_budget, add_compiler, add_files, at_least_one, listed, plain_parser
from bench.crossing import pace, pairs
from bench.errors import BenchError, exit_code
from bench.photos import MOST, grids
from bench.presets import PRESETS, Preset
from bench.processes import ORDER, Runs, check_names, in_turns
from bench.ratios import spread

PRESET = "qwen2.5-vl-cpu"
HEAD_DIM = 64
LIMIT = 1800


def main() -> None:
    """Runs the benchmark, prints tables, and writes JSON and markdown where asked to."""
    args = _options().parse_args()
    preset = preset_of(args.layers, args.hidden)
    names = args.contenders or [name for name in ORDER if not (args.first and name == "hf-eager")]
    check_names(names)
    if args.pictures > MOST:
        raise BenchError(f"--pictures {args.pictures}: there are {MOST} sizes")
    tasks = _tasks(args, preset)
    mode, axis = ("first", "layers") if args.first else ("answers", "batch")
    found = {
        **record.header("bench.answers", PRESET, None if args.first else preset),
        **{"budget": args.budget, "compiler": args.compiler, "new_tokens": args.new_tokens},
        **{"threads": args.threads, "pictures": grids(2 if args.first else args.pictures)},
    }

    def write(runs: Mapping[int, Runs]) -> None:
        found[mode] = [{axis: at, **_point(runs[at])} for at in runs]
        if args.first:
            found["goals"] = first_answers.goals(found[mode])
        record.write(found, args.json)

    in_turns(axis, tasks, names, args.rounds, args.limit, write)
    text = first_answers.markdown(found) if args.first else markdown(found)
    record.write_text(text, args.markdown)
    sys.stdout.write(f"{text}\n")


def _options() -> Parser:
    options = plain_parser(__doc__)
    options.add_argument("--first", action="store_true", help="two pictures, at several depths of the decoder")
    options.add_argument("--layers", type=at_least_one, help="decoder layers")
    options.add_argument("--depths", type=listed(at_least_one), default=[4, 8, 24], help="with --first: layers, by comma")
    options.add_argument("--hidden", type=at_least_one, help="size of a token's state, a multiple of 64")
    options.add_argument("--pictures", type=at_least_one, default=10, help="requests of a process, each of another size")
    options.add_argument("--batches", type=listed(at_least_one), default=[1, 4], help="samples of a request, by comma")
    options.add_argument("--new-tokens", type=at_least_one, default=32, help="of an answer")
    add_budget(options)
    options.add_argument("--contenders", type=listed(str), help=f"some of {', '.join(ORDER)}, by comma")
    options.add_argument("--rounds", type=at_least_one, default=3, help="processes of each contender")
    options.add_argument("--threads", type=at_least_one, default=2, help="torch's threads")
    options.add_argument("--limit", type=at_least_one, default=LIMIT, help="seconds that a process may take")
    add_files(options, "json", "markdown")
    add_compiler(options)
    return options


def preset_of(layers: int | None = None, hidden: int | None = None) -> Preset:
    """The preset with another depth, or of another width: heads, and what lies between layers, with it.

    Raises:
        BenchError: The width cannot be shared out to heads.
    """
    preset = PRESETS[PRESET]
    if hidden is not None:
        if hidden % 64:
            raise BenchError(f"--hidden {hidden} is no multiple of 64")
        head_dim = min(HEAD_DIM, hidden // 4)
        heads = hidden // head_dim
        wide = hidden * preset.feed_forward // preset.hidden
        preset = dataclasses.replace(
            preset, hidden=hidden, heads=heads, kv_heads=max(1, heads // 4), head_dim=head_dim, feed_forward=wide
        )
    return preset if layers is None else dataclasses.replace(preset, layers=layers)


def _tasks(args: Any, preset: Preset) -> dict[int, Task]:
    """By depth or by batch size."""
    base = Task("", preset, args.pictures, 1, args.new_tokens, args.budget, args.compiler, args.threads)
    if args.first:
        deep = {depth: dataclasses.replace(preset, layers=depth) for depth in args.depths}
        return {depth: dataclasses.replace(base, preset=deep[depth], pictures=2) for depth in args.depths}
    return {batch: dataclasses.replace(base, batch=batch) for batch in args.batches}


def _point(runs: Runs) -> dict[str, Any]:
    rows = {name: row_of(rounds) for name, rounds in runs.items() if rounds}
    return {"rows": rows, "pairs": pairs(rows)}


def row_of(rounds: Sequence[Answers]) -> dict[str, Any]:
    """A contender's medians, and all rounds with them.

    `ready_s` and `answers_s` count from the start of the process; `first_s` and `second_s` are how long these two answers
    took.
    """
    each = [dataclasses.asdict(one) for one in rounds]
    took: dict[str, list[float]] = {"first_s": [one.answers_s[0] - one.ready_s for one in rounds]}
    if len(rounds[0].answers_s) > 1:
        took["second_s"] = [one.answers_s[1] - one.answers_s[0] for one in rounds]
    totals = {"ready_s": [one.ready_s for one in rounds], "last_s": [one.answers_s[-1] for one in rounds]}
    return {
        **{key: statistics.median(values) for key, values in {**totals, **took}.items()},
        "answers_s": [statistics.median(times) for times in zip(*(one.answers_s for one in rounds), strict=True)],
        "graphs": max(one.graphs for one in rounds),
        "kinds": rounds[-1].kinds,
        "spread": {key: spread(values) for key, values in {**totals, **took}.items()},
        "rounds": each,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Per batch size, when answers were there, and where lines cross."""
    parts = []
    for point in found["answers"]:
        count = len(found["pictures"])
        shown = sorted({1, 2, 3, (count + 1) // 2, count} & set(range(1, count + 1)))
        head = ["", "loaded s", *(f"answer {number} s" for number in shown), "s/answer then", "graphs"]
        lines = []
        for name, row in point["rows"].items():
            times = [format(row["answers_s"][number - 1], ".1f") for number in shown]
            lines.append(
                [name, format(row["ready_s"], ".1f"), *times, format(pace(row["answers_s"]), ".2f"), str(row["graphs"])]
            )
        crossings = [
            [pair["contender"], pair["base"], format(pair["first"], ".2f"), format(pair["last"], ".2f"), _crossing(pair)]
            for pair in point["pairs"]
        ]
        parts += [f"### Batch {point['batch']}", "", table.markdown(head, lines), ""]
        if crossings:
            parts += [table.markdown(["", "against", "first answer", "last answer", "ahead from answer"], crossings), ""]
    return "\n".join(parts).rstrip()


def _crossing(pair: Mapping[str, Any]) -> str:
    if pair["ahead_from"] is not None:
        return str(pair["ahead_from"])
    return "never" if pair["ahead_at_pace"] is None else f"about {pair['ahead_at_pace']}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
