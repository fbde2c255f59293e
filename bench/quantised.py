"""What ways to quantise keys and values cost: bytes, and how far the next tokens' distributions move.

All tokens stay (a budget of 1.0). The prompt is computed in float32 and then quantised; 64 tokens are forced, each of which is
quantised as well, and the distributions of what follows them are compared with the full cache's: mean Kullback-Leibler
divergence, in nats.

    python -m bench.quantised --json quantised.json                # SmolLM2-135M-Instruct, five texts: half an hour
    python -m bench.quantised --schemes "int8;int4" --texts execmodel  # one of them, two schemes
    python -m bench.quantised --model digits                       # the small model of the demonstration, head dim 32
"""

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import record, table
from bench.arguments import Parser, add_files, at_least_one, listed, plain_parser
from bench.errors import BenchError, exit_code
from bench.schemes import SCHEMES, Scheme
from bench.simulated import Simulation
from tests.support import smollm2
from tgvkv_compile import digits

QUESTIONS = 24
"""Of the small model, content and position in turns; their answers are forced."""


def main() -> None:
    """Measures, prints a table after each text, writes JSON where asked to."""
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    schemes = chosen(args.schemes)
    found: dict[str, Any] = {**record.header("bench.quantised", args.model, None), "rows": {}}
    for text, simulation in simulations(args.model, args.texts):
        measure(found["rows"], text, simulation, schemes)
        record.write(found, args.json)
        sys.stderr.write(f"{text}\n")
    sys.stdout.write(f"{markdown(found['rows'])}\n")


def _options() -> Parser:
    options = plain_parser(__doc__)
    options.add_argument("--model", choices=["smollm2", "digits"], default="smollm2")
    options.add_argument("--texts", type=listed(str), default=list(smollm2.CHAPTERS), help="of smollm2, by comma")
    options.add_argument("--schemes", type=lambda names: names.split(";"), help="names, by semicolon")
    options.add_argument("--threads", type=at_least_one, default=2, help="torch's threads")
    add_files(options, "json")
    return options


def chosen(names: list[str] | None) -> list[Scheme]:
    """The schemes of these names; all of them where none is named.

    Raises:
        BenchError: There is none of a name.
    """
    by_name = {scheme.name: scheme for scheme in SCHEMES}
    for name in names or ():
        if name not in by_name:
            raise BenchError(f"no scheme {name!r}; there are {'; '.join(by_name)}")
    return [by_name[name] for name in names or by_name]


@torch.no_grad()
def simulations(model: str, texts: list[str]) -> Iterator[tuple[str, Simulation]]:
    """What is asked, by name.

    Raises:
        BenchError: The model's weights are not installed, or there is no such text.
    """
    if model == "digits":
        loaded, processor = digits.load_model(), digits.load_processor()
        for number, asked in enumerate(digits.held_out_questions(QUESTIONS)):
            inputs = processor(images=asked.image, text=asked.prompt, return_tensors="pt")
            answer = processor.tokenizer(asked.answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
            yield f"question {number}", Simulation(loaded, dict(inputs), answer)
        return
    if (reason := smollm2.missing()) is not None:
        raise BenchError(reason)
    for text in texts:
        if text not in smollm2.CHAPTERS:
            raise BenchError(f"no text {text!r}; there are {', '.join(smollm2.CHAPTERS)}")
    for text in texts:
        loaded, passage = smollm2.make_model(), smollm2.passage(text, smollm2.CHAPTERS[text])
        yield text, Simulation(loaded, smollm2.inputs_of(loaded, passage), passage.forced)


@torch.no_grad()
def measure(rows: dict[str, Any], text: str, simulation: Simulation, schemes: list[Scheme]) -> None:
    """Adds a text's figures to each scheme's row: divergence (mean, largest), and how many best followers are the same."""
    full = simulation.say(None)
    for scheme in schemes:
        found = simulation.say(scheme)
        lost = smollm2.divergence(full, found)
        row = rows.setdefault(scheme.name, {"share": scheme.share, "texts": {}})
        row["texts"][text] = {"kl": float(lost.mean()), "largest": float(lost.max()), "same": _same_best(full, found)}


def _same_best(full: Tensor, found: Tensor) -> float:
    return float((full.argmax(-1) == found.argmax(-1)).float().mean())


def markdown(rows: dict[str, Any]) -> str:
    """A line per scheme: bytes at head dim 64 over bfloat16's, divergence (mean, a text's largest mean, a token's largest)."""
    lines = []
    for name, row in rows.items():
        texts = row["texts"].values()
        means = [text["kl"] for text in texts]
        figures = [statistics.fmean(means), max(means), max(text["largest"] for text in texts)]
        same = statistics.fmean(text["same"] for text in texts)
        lines.append([name, f"{row['share']:.3f}", *(f"{value:.5f}" for value in figures), f"{same:.3f}"])
    return table.markdown(["scheme", "bytes", "mean KL", "worst text", "worst token", "same best"], lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
