"""Compile, prefill, decode and memory of one preset: this backend against stock transformers and the lower bound.

One process, the same weights; contenders take turns in each round. Medians, their spread and ratios.

    python -m bench.run --preset llava-next-cpu --budget 0.05 --json out.json
"""

import sys
from pathlib import Path

from bench import record, table
from bench.arguments import add_compiler, fraction, listed, parser, preset_of
from bench.contenders import default_names, make_contenders
from bench.errors import exit_code
from bench.measure import ANSWER, measure
from bench.models import make_model, pictures_of, weight_bytes
from bench.ratios import ratios


def main() -> None:
    """Runs the benchmark, prints its table, and writes JSON where asked to."""
    options = parser(__doc__)
    options.add_argument("--budget", type=fraction, default=0.05, help="fraction of KV that tgvkv and the lower bound keep")
    options.add_argument("--contenders", type=listed(str), help="some of the rows, by comma")
    add_compiler(options)
    options.add_argument("--json", type=Path, help="file to write")
    args = options.parse_args()
    preset = preset_of(args)
    names = tuple(args.contenders or default_names(preset.device))
    begun = record.header("bench.run", preset)
    model = make_model(preset)
    rows = measure(make_contenders(names, model, preset, args.budget, args.compiler), model, preset)
    found = {
        **begun,
        "preset_name": args.preset,
        "budget": args.budget,
        "compiler": args.compiler,
        "prompt": {"tokens": preset.context, "vision_tokens": pictures_of(preset) * preset.picture_side**2},
        "answer_tokens": ANSWER,
        "weight_bytes": weight_bytes(model),
        "rows": rows,
        "ratios": ratios(rows),
    }
    if args.json is not None:
        record.write(found, args.json)
    lines = [f"{key:22s} {value:.3f}" for key, value in found["ratios"].items()]
    sys.stdout.write("\n".join([table.of_rows(rows), "", *lines]) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
