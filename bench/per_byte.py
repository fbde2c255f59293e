"""How many answers are right for how many bytes of KV: fewer tokens as they are, against more of them in fewer bits.

The small model of the demonstration, in bfloat16, on held-out questions; the first token of an answer does not count, because
eviction cannot change it. A row has for each `kv_dtype` as many tokens per layer as fit into the same bytes, a share of what
the whole cache takes in bfloat16. What the caches held is measured.

    python -m bench.per_byte --json per-byte.json --markdown per-byte.md --picture per-byte.png
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from bench import drawing, record, table
from bench.arguments import add_files, at_least_one, fraction, listed, plain_parser
from bench.errors import exit_code
from bench.measure import say
from tgvkv_compile import digits, tgvkv_backend
from tgvkv_compile.backend.memory import tokens_within
from tgvkv_compile.cli.accuracy import Batch, make_batches, measure
from tgvkv_compile.config import KVDtype, Lowering
from tgvkv_compile.ops.cache.quantising import bytes_per_entry

SHARES = [0.02, 0.05, 0.1, 0.2, 0.5]


def main() -> None:
    """Measures, prints the table, writes what was asked for."""
    options = plain_parser(__doc__)
    options.add_argument("--shares", type=listed(fraction), default=SHARES, help="of the whole cache's bytes, by comma")
    options.add_argument("--questions", type=at_least_one, default=200)
    options.add_argument("--threads", type=at_least_one, default=2, help="torch's threads")
    options.add_argument("--lowering", choices=get_args(Lowering), default="eager", help="it changes no answer")
    add_files(options, "json", "markdown", "picture")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    processor = digits.load_processor()
    batches = make_batches(processor, digits.held_out_questions(args.questions))
    found: dict[str, Any] = {**record.header("bench.per_byte", "digits", None), "questions": args.questions, "rows": []}
    for share in args.shares:
        for kv_dtype in (None, *get_args(KVDtype)):
            say(f"{share:.0%} of the bytes, {kv_dtype or 'bfloat16'}")
            found["rows"].append(
                {"share": share, "kv_dtype": kv_dtype, **answered(batches, processor, share, kv_dtype, args.lowering)}
            )
            record.write(found, args.json)
    lines = markdown(found)
    record.write_text(lines, args.markdown)
    if args.picture is not None:
        draw(found, args.picture)
    sys.stdout.write(f"{lines}\n")


def answered(
    batches: list[Batch], processor: Any, share: float, kv_dtype: KVDtype | None, lowering: Lowering
) -> dict[str, Any]:
    """Right answer tokens by kind of question, and what the caches held, by a model that has so many bytes."""
    torch._dynamo.reset()
    model = digits.load_model().to(torch.bfloat16)
    here = [
        dataclasses.replace(
            one, inputs={name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in one.inputs.items()}
        )
        for one in batches
    ]
    text = model.config.text_config
    memory = int(share * here[0].inputs["input_ids"].shape[1] * bytes_per_token(text, None))
    tokens = tokens_within(memory, bytes_per_token(text, kv_dtype), kv_dtype)
    model.compile(backend=tgvkv_backend(tokens, kv_dtype=kv_dtype, lowering=lowering))
    measured = measure(model, processor, here, lambda _: None)
    return {
        "memory": memory,
        "tokens": tokens,
        "held_bytes": measured.physical_bytes - measured.reserve_bytes,
        "full_bytes": measured.logical_bytes,
        **{kind: {"right": tally.right, "total": tally.total} for kind, tally in measured.accuracy.items()},
    }


def bytes_per_token(config: Any, kv_dtype: KVDtype | None) -> int:
    """Of all layers' keys and values; None: in bfloat16."""
    entry = bytes_per_entry(kv_dtype, config.head_dim, torch.bfloat16)
    return int(config.num_hidden_layers * config.num_key_value_heads * 2 * entry)


def markdown(found: Mapping[str, Any]) -> str:
    """A line per number of bytes: right answers to content questions and to position questions for each `kv_dtype`."""
    kinds = [(kv_dtype, kind) for kind in ("content", "position") for kv_dtype in (None, *get_args(KVDtype))]
    head = ["bytes", *(f"{kind}, {kv_dtype or 'bfloat16'}" for kv_dtype, kind in kinds)]
    rows = {(row["share"], row["kv_dtype"]): row for row in found["rows"]}
    lines = [
        [f"{share:.0%}", *(f"{_right(rows[share, kv_dtype], kind):.1%}" for kv_dtype, kind in kinds)]
        for share in dict.fromkeys(row["share"] for row in found["rows"])
    ]
    return table.markdown(head, lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A panel per kind of question: right answers over bytes, a line per `kv_dtype`."""
    figure, axes = drawing.subplots(1, 2, figsize=(10, 4), squeeze=False)
    for panel, kind in zip(axes[0], ("content", "position"), strict=True):
        for kv_dtype in (None, *get_args(KVDtype)):
            rows = [row for row in found["rows"] if row["kv_dtype"] == kv_dtype]
            panel.plot(
                [100 * row["memory"] / _whole(row) for row in rows],
                [100 * _right(row, kind) for row in rows],
                marker=".",
                label=kv_dtype or "bfloat16",
            )
        panel.set_xscale("log")
        shares = sorted({row["share"] for row in found["rows"]})
        panel.set_xticks([100 * share for share in shares], [f"{share:.0%}" for share in shares])
        panel.minorticks_off()
        panel.set_xlabel("bytes of KV, of the whole cache in bfloat16")
        panel.set_ylabel(f"right answers, {kind} questions (%)")
        panel.grid(True, alpha=0.25)
    axes[0][0].legend()
    drawing.save(figure, path)


def _right(row: Mapping[str, Any], kind: str) -> float:
    return row[kind]["right"] / max(1, row[kind]["total"])


def _whole(row: Mapping[str, Any]) -> float:
    return row["memory"] / row["share"]


if __name__ == "__main__":
    sys.exit(exit_code(main))
