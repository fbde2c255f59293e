"""What the demonstration found out, as tables and as JSON."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from tgvkv_compile.cli.accuracy import Measured, Tally
from tgvkv_compile.cli.report import budget_label, cache_lines, machine, versions
from tgvkv_compile.cli.showcase import Showcase
from tgvkv_compile.cli.speed import ROUNDS, STEPS, Speed, verdicts
from tgvkv_compile.config import BudgetOf, DecodeMode, Lowering
from tgvkv_compile.digits import Question

KINDS = ("content", "position")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demonstration is asked to do; the options of `tgvkv demo`."""

    questions: int
    budgets: tuple[float | int, ...]
    bases: tuple[BudgetOf, ...]
    lowering: Lowering
    decode: DecodeMode
    seed: int
    picture: Path
    json: Path | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run the model; without a budget it is `torch.compile` with the full KV cache."""

    budget: float | int | None
    budget_of: BudgetOf | None
    measured: Measured

    def same_answers(self, full: "Row") -> int:
        """How many answers are, token for token, those of the full cache."""
        return sum(one == two for one, two in zip(self.measured.texts, full.measured.texts, strict=True))


def label(budget: float | int | None, budget_of: BudgetOf | None) -> str:
    """Name of a way to run the model."""
    return "full KV" if budget is None else f"{budget_label(budget)} of {budget_of}"


def print_showcase(console: Console, shown: Showcase, settings: Settings) -> None:
    """One question: answers and cache."""
    scene = shown.scene
    batch = f", in a batch of {shown.report.batch_size}" if shown.report.batch_size > 1 else ""
    console.print(f"\n[bold]One question[/bold]{batch}, compiled with {settings.lowering}: {scene.question}")
    console.print(f"  right answer     {scene.truth}")
    console.print(f"  full KV          {scene.full_answer}")
    console.print(f"  {scene.budget:<16} {scene.answer}")
    for line in cache_lines(shown.report):
        console.print(f"  {line}", soft_wrap=True)
    console.print()


def print_speed(console: Console, speeds: Sequence[Speed], length: int, weights: int, settings: Settings) -> None:
    """How fast each contender is, and whether anything is gained.

    Args:
        console: Where to print.
        speeds: Of all contenders.
        length: Tokens of a prompt, padding counted.
        weights: Bytes of the model's weights.
        settings: Of the demonstration.
    """
    rows = speeds[0].rows
    table = _table(f"Speed: {rows} {'questions' if rows > 1 else 'question'} of {length} tokens at once")
    table.add_column("", no_wrap=True)
    for name in ("first, s", "later, s", "prompt, ms", "step, ms", "tokens/s", "KV, MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in speeds:
        table.add_row(
            one.name,
            f"{one.first_seconds:.1f}",
            f"{one.later.seconds:.2f}",
            f"{one.later.prompt_ms:.0f}",
            f"{one.later.step_ms:.1f}",
            f"{one.tokens_per_second:.0f}",
            f"{one.physical_bytes / 2**20:.1f}",
        )
    console.print(table)
    for line in verdicts(speeds):
        console.print(line, style="bold")
    full = max(one.physical_bytes for one in speeds if one.budget is None) / 2**20
    console.print(
        f"first: the first answer of {STEPS + 1} tokens, compilation included, from empty caches; what was compiled for a row "
        f"further up is not compiled again. later: the same answer afterwards; medians of {ROUNDS}, contenders take turns. "
        "prompt: until the first token; step: one decode step. "
        f"A step reads {full:.0f} MiB of full KV and {weights / 2**20:.0f} MiB of weights.",
        style="dim",
    )
    if settings.lowering != "inductor":
        console.print(f"lowering={settings.lowering!r} is for debugging: these figures are not Inductor's.", style="bold")
    console.print()


def print_examples(console: Console, questions: Sequence[Question], rows: Sequence[Row], settings: Settings) -> None:
    """The answers to some questions at every budget."""
    basis = settings.bases[0]
    table = _table(f"The first questions, budget of {basis}")
    table.add_column("", no_wrap=True)
    for question in questions:
        table.add_column(question.prompt.split("<image>")[-1].removesuffix("answer :").strip())
    table.add_row("right answer", *(question.answer for question in questions), end_section=True)
    for row in rows:
        if row.budget_of in (None, basis):
            name = "full KV" if row.budget is None else budget_label(row.budget)
            table.add_row(name, *row.measured.texts[: len(questions)])
    console.print(table)
    console.print()


def print_table(console: Console, rows: Sequence[Row], settings: Settings) -> None:
    """Accuracy and memory of every way to run the model."""
    full = rows[0]
    counts = " and ".join(f"{full.measured.accuracy[kind].total}" for kind in KINDS)
    table = _table(f"Accuracy: {len(full.measured.texts)} held-out questions")
    table.add_column("KV budget", no_wrap=True)
    for name in (*KINDS, "same", "KV, MiB", "of full"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        measured = row.measured
        table.add_row(
            label(row.budget, row.budget_of),
            *(_percent(measured.accuracy[kind]) for kind in KINDS),
            f"{row.same_answers(full)}/{len(measured.texts)}",
            f"{measured.physical_bytes / 2**20:.1f}",
            f"{measured.physical_bytes / measured.logical_bytes:.1%}",
            end_section=index + 1 == len(rows) or rows[index + 1].budget_of != row.budget_of,
        )
    console.print(table)
    console.print(
        f"content, position: right ones among {counts} tokens after the first of each answer, by greedy generate(); "
        "a missing one is wrong. same: answers equal to those of the full cache. "
        "KV: bytes held by all caches after the answers, room for growth included. "
        f"All rows were compiled with {settings.lowering}, full KV by torch.compile itself.",
        style="dim",
    )


def as_json(
    settings: Settings,
    shown: Showcase,
    speeds: Sequence[Speed],
    questions: Sequence[Question],
    rows: Sequence[Row],
    picture: Path | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything that was measured, with what it was measured on."""
    scene = shown.scene
    return {
        "versions": versions(),
        "machine": machine(),
        "settings": {
            "questions": settings.questions,
            "budgets": list(settings.budgets),
            "budget_of": list(settings.bases),
            "lowering": settings.lowering,
            "decode": settings.decode,
            "seed": settings.seed,
        },
        "showcase": {
            "question": scene.question,
            "right_answer": scene.truth,
            "answer": scene.answer,
            "full_answer": scene.full_answer,
            "budget": scene.budget,
            "prompt_tokens": scene.prompt_length,
            "kept_per_layer": [len(kept) for kept in scene.kept],
            "kept_patches_per_layer": [int(scene.kept_patches(layer).sum()) for layer in range(len(scene.kept))],
            "physical_bytes": shown.report.physical_bytes,
            "logical_bytes": shown.report.logical_bytes,
            "reserve_bytes": shown.report.reserve_bytes,
            "batch": shown.report.batch_size,
        },
        "speed": {
            "answer_tokens": STEPS + 1,
            "rounds": ROUNDS,
            "contenders": [_speed_as_json(one) for one in speeds],
            "verdicts": verdicts(speeds),
        },
        "rows": [_row_as_json(row, rows[0]) for row in rows],
        "questions": [
            {
                "prompt": question.prompt,
                "kind": question.kind,
                "right_answer": question.answer,
                "answers": {label(row.budget, row.budget_of): row.measured.texts[place] for row in rows},
            }
            for place, question in enumerate(questions)
        ],
        "picture": None if picture is None else str(picture),
        "seconds": seconds,
    }


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=HORIZONTALS, show_edge=False, pad_edge=False)


def _speed_as_json(one: Speed) -> dict[str, Any]:
    return {
        "name": one.name,
        "budget": one.budget,
        "budget_of": one.budget_of,
        "compiled": one.compiled,
        "first_answer_seconds": one.first_seconds,
        "answer_seconds": one.later.seconds,
        "prompt_ms": one.later.prompt_ms,
        "step_ms": one.later.step_ms,
        "tokens_per_second": one.tokens_per_second,
        "batch": one.rows,
        "physical_bytes": one.physical_bytes,
    }


def _row_as_json(row: Row, full: Row) -> dict[str, Any]:
    measured = row.measured
    return {
        "budget": row.budget,
        "budget_of": row.budget_of,
        "accuracy_after_first": {
            kind: {"right": tally.right, "total": tally.total, "share": tally.share}
            for kind, tally in measured.accuracy.items()
        },
        "same_answers_as_full": row.same_answers(full),
        "physical_bytes": measured.physical_bytes,
        "logical_bytes": measured.logical_bytes,
        "reserve_bytes": measured.reserve_bytes,
        "seconds": measured.seconds,
    }


def _percent(tally: Tally) -> str:
    return "-" if tally.share is None else f"{tally.share:.1%}"
