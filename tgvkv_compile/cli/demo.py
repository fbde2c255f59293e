"""`tgvkv demo`: the embedded model with its full KV cache and with less of it."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.cli.accuracy import make_batches, measure
from tgvkv_compile.cli.inputs import quiet_transformers
from tgvkv_compile.cli.picture import draw_scene
from tgvkv_compile.cli.problems import CommandError
from tgvkv_compile.cli.report import machine, versions
from tgvkv_compile.cli.results import Row, Settings, as_json, label, print_examples, print_showcase, print_table
from tgvkv_compile.cli.showcase import Showcase, can_compile, show
from tgvkv_compile.digits import Question, held_out_questions, load_model, load_processor

EXAMPLES = 4
SHOWN_BUDGET = 0.2


def run_demo(settings: Settings, console: Console | None = None) -> None:
    """Runs the demonstration.

    Args:
        settings: What to do.
        console: Where to print; standard output if not given.

    Raises:
        CommandError: A file cannot be written, or the embedded model is missing.
    """
    console = console or Console(highlight=False)
    begun = time.perf_counter()
    for path in filter(None, (settings.picture, settings.json)):
        if not path.absolute().parent.is_dir():
            raise CommandError(f"no such folder: {path.parent}")
    if "inductor" in (settings.showcase_lowering, settings.table_lowering) and not can_compile():
        console.print("No C++ compiler was found, which Inductor needs: everything runs with --lowering eager.")
        settings = dataclasses.replace(settings, showcase_lowering="eager", table_lowering="eager")
    questions = held_out_questions(settings.questions, seed=settings.seed)
    model, processor = _load()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"The model reads handwritten digits: LLaVA, {parameters / 1e6:.1f} M parameters, "
        f"{model.config.text_config.num_hidden_layers} layers, {model.config.image_seq_length} vision tokens. "
        f"{', '.join(f'{name} {value}' for name, value in versions().items())}; {machine()['torch_threads']} threads."
    )

    shown = _show(console, model, processor, questions[0], settings)
    print_showcase(console, shown, settings)
    picture = _draw(console, shown, settings.picture)

    torch.compiler.reset()
    model, processor = _load()
    rows = _measure_all(console, model, processor, questions, settings)
    print_examples(console, questions[:EXAMPLES], rows, settings)
    print_table(console, rows, settings)

    seconds = time.perf_counter() - begun
    if settings.json is not None:
        results = as_json(settings, shown, questions, rows, picture, seconds)
        try:
            settings.json.write_text(json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise CommandError(f"cannot write {settings.json}: {error.strerror}") from None
        console.print(f"Results: {settings.json}", soft_wrap=True)
    if picture is not None:
        console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"The demonstration took {seconds:.0f} s.")


def _load() -> tuple[Any, Any]:
    try:
        with quiet_transformers():
            return load_model(), load_processor()
    except FileNotFoundError as error:
        raise CommandError(str(error)) from None


def _show(console: Console, model: Any, processor: Any, question: Question, settings: Settings) -> Showcase:
    budget = min(settings.budgets, key=lambda one: abs(one - SHOWN_BUDGET) if isinstance(one, float) else 1.0)
    with console.status(f"compiling one question's run ({settings.showcase_lowering})"):
        return show(model, processor, question, budget, settings.bases[0], settings.showcase_lowering, settings.decode)


def _draw(console: Console, shown: Showcase, path: Path) -> Path | None:
    try:
        draw_scene(shown.scene, path)
    except ImportError:
        console.print("No picture: matplotlib is missing; pip install 'tgvkv-compile\\[plot]' brings it.", soft_wrap=True)
        return None
    return path


def _measure_all(console: Console, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> list[Row]:
    """Full KV uncompiled, then every budget; each has a backend of its own."""
    batches = make_batches(processor, questions)
    reserve = max(batch.new_tokens for batch in batches)
    ways = [(None, None), *((budget, basis) for basis in settings.bases for budget in settings.budgets)]
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("questions"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = progress.add_task("", total=len(ways) * len(questions))
        for budget, basis in ways:
            progress.update(total, description=label(budget, basis))
            if budget is not None and basis is not None:
                torch.compiler.reset()  # the graphs of the budget before
                backend = tgvkv_backend(
                    budget,
                    budget_of=basis,
                    lowering=settings.table_lowering,
                    decode=settings.decode,
                    growth_reserve=reserve,
                )
                model.compile(backend=backend)
            measured = measure(model, processor, batches, lambda count: progress.advance(total, count))
            rows.append(Row(budget, basis, measured))
    return rows
