"""Compile, prefill, decode and memory of one preset: this backend against stock transformers and the lower bound.

One process, the same weights; contenders take turns in each round. Medians, their spread and ratios.

    python -m bench.run --preset llava-next-cpu --budget 0.05 --json out.json
"""

import sys

from bench import record, table
from bench.arguments import add_budget, add_compiler, add_files, listed, parser, preset_of
from bench.contenders import default_names, make_contenders
from bench.errors import exit_code
from bench.measure import conditions, measure
from bench.models import make_model
from bench.ratios import among_ours, ratios


def main() -> None:
    """Runs the benchmark, prints its table, and writes JSON where asked to."""
    options = parser(__doc__)
    add_budget(options, "fraction of KV that tgvkv and the lower bound keep")
    options.add_argument("--contenders", type=listed(str), help="some of the rows, by comma")
    add_compiler(options)
    add_files(options, "json")
    args = options.parse_args()
    preset = preset_of(args)
    names = tuple(args.contenders or default_names(preset.device))
    begun = record.header("bench.run", args.preset, preset)
    model = make_model(preset)
    rows = measure(make_contenders(names, model, preset, args.budget, args.compiler), model, preset)
    found = {
        **begun,
        "budget": args.budget,
        "compiler": args.compiler,
        **conditions(model, preset),
        "rows": rows,
        "ratios": {**ratios(rows), **among_ours(rows)},
    }
    record.write(found, args.json)
    sys.stdout.write(f"{table.of_run(rows, found['ratios'])}\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
