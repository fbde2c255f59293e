"""`tgvkv demo`: the embedded model with its full KV cache and with less of it."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from tgvkv_compile.backend.backend import tgvkv_backend
from tgvkv_compile.cli.accuracy import Batch, make_batches, measure
from tgvkv_compile.cli.compiling import compiling_shown, waiting_shown
from tgvkv_compile.cli.inputs import quiet_transformers
from tgvkv_compile.cli.picture import draw_scene
from tgvkv_compile.cli.problems import CommandError
from tgvkv_compile.cli.report import machine, versions
from tgvkv_compile.cli.results import Row, Settings, as_json, label, print_examples, print_showcase, print_speed, print_table
from tgvkv_compile.cli.showcase import Showcase, can_compile, show
from tgvkv_compile.cli.speed import ROUNDS, STEPS, Contender, Speed, race
from tgvkv_compile.cli.timing import cold_caches, timed_answer
from tgvkv_compile.config import BudgetOf
from tgvkv_compile.digits import Question, held_out_questions, load_model, load_processor

EXAMPLES = 4
SHOWN_BUDGET = 0.2

Way = tuple[float | int | None, BudgetOf | None]
"""Budget and what it is of; both None for the full cache."""


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
    if settings.lowering == "inductor" and not can_compile():
        console.print("No C++ compiler was found, which Inductor needs: everything runs with --lowering eager.")
        settings = dataclasses.replace(settings, lowering="eager")
    questions = held_out_questions(settings.questions, seed=settings.seed)
    model, processor = _load()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"The model reads handwritten digits: LLaVA, {parameters / 1e6:.1f} M parameters, "
        f"{model.config.text_config.num_hidden_layers} layers, {model.config.image_seq_length} vision tokens. "
        f"{', '.join(f'{name} {value}' for name, value in versions().items())}; {machine()['torch_threads']} threads.\n"
    )
    batches = make_batches(processor, questions)
    with cold_caches():
        contenders = _contenders(model, batches, settings)
        first = [first_answer(console, one, batches[0].inputs) for one in contenders]
        shown = _show(contenders, processor, questions, settings)
        print_showcase(console, shown, settings)
        picture = _draw(console, shown, settings.picture)
        speeds = _race(console, contenders, first, batches[0])
        print_speed(console, speeds, batches[0].inputs["input_ids"].shape[1], _decoder_bytes(model), settings)
        rows = _measure_all(console, contenders, processor, batches, settings)
    print_examples(console, questions[:EXAMPLES], rows, settings)
    print_table(console, rows, settings)

    seconds = time.perf_counter() - begun
    if settings.json is not None:
        results = as_json(settings, shown, speeds, questions, rows, picture, seconds)
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


def _decoder_bytes(model: Any) -> int:
    """What a decode step reads besides the cache."""
    return sum(one.nbytes for name, one in model.named_parameters() if "vision" not in name and "projector" not in name)


def _contenders(model: Any, batches: Sequence[Batch], settings: Settings) -> list[Contender]:
    """The full cache twice, and the budgets that are shown and timed."""
    budgets = [min(settings.budgets, key=_from_shown)]
    smallest = min(settings.budgets, key=lambda one: (isinstance(one, float), one))
    budgets += [smallest] if smallest != budgets[0] else []
    # Backends set dynamo's process-wide flags, so they are made first: the full cache is compiled under the same ones.
    ours = [_with_budget(budget, settings.bases[0], batches, settings) for budget in budgets]
    compiled, _ = _load()
    compiled.compile(backend=settings.lowering)
    named = "torch.compile" if settings.lowering == "inductor" else f"torch.compile ({settings.lowering})"
    return [Contender(None, None, None, model), Contender(None, None, named, compiled), *ours]


def _from_shown(budget: float | int) -> float:
    return abs(budget - SHOWN_BUDGET) if isinstance(budget, float) else 1.0


def _with_budget(budget: float | int, basis: BudgetOf, batches: Sequence[Batch], settings: Settings) -> Contender:
    reserve = max(STEPS + 1, *(batch.new_tokens for batch in batches))
    model, _ = _load()
    model.compile(
        backend=tgvkv_backend(
            budget, budget_of=basis, lowering=settings.lowering, decode=settings.decode, growth_reserve=reserve
        )
    )
    return Contender(budget, basis, "tgvkv", model)


def first_answer(console: Console, one: Contender, inputs: Mapping[str, Tensor]) -> float:
    """Seconds that a user waits for it; says so, and meanwhile what is compiled."""
    begun = time.perf_counter()
    waiting = waiting_shown("graphs of the first answer") if one.compiler is not None else contextlib.nullcontext()
    with compiling_shown(console, what=one.name), waiting:
        timed_answer(one.model, inputs, STEPS)
    seconds = time.perf_counter() - begun
    console.print(f"{one.name}: first answer after {seconds:.1f} s")
    return seconds


def _show(contenders: Sequence[Contender], processor: Any, questions: Sequence[Question], settings: Settings) -> Showcase:
    full, _, ours, *_ = contenders
    assert ours.budget is not None and ours.budget_of is not None
    return show(full.model, ours.model, processor, questions[:2], ours.budget, ours.budget_of)


def _draw(console: Console, shown: Showcase, path: Path) -> Path | None:
    try:
        draw_scene(shown.scene, path)
    except ImportError:
        console.print("No picture: matplotlib is missing; pip install 'tgvkv-compile\\[plot]' brings it.", soft_wrap=True)
        return None
    return path


def _race(console: Console, contenders: Sequence[Contender], first: Sequence[float], batch: Batch) -> list[Speed]:
    with _progress(console, "answers") as progress, compiling_shown(console, beside=progress):
        total = progress.add_task("timing, in turns", total=ROUNDS * len(contenders))
        return race(contenders, first, batch.inputs, lambda: progress.advance(total))


def _measure_all(
    console: Console, contenders: Sequence[Contender], processor: Any, batches: Sequence[Batch], settings: Settings
) -> list[Row]:
    """The full cache, then every budget; each has a backend of its own, all the same compiler."""
    ways = list(_ways(settings))
    made = {(one.budget, one.budget_of): one for one in contenders if one.compiler is not None}
    count = sum(len(batch.questions) for batch in batches)
    rows: list[Row] = []
    with _progress(console, "questions") as progress:
        total = progress.add_task("", total=len(ways) * count)
        for way in ways:
            progress.update(total, description=label(*way))
            with compiling_shown(console, what=label(*way), beside=progress):
                one = made.pop(way, None) or _with_budget(*_budgeted(way), batches, settings)
                measured = measure(one.model, processor, batches, lambda number: progress.advance(total, number))
            rows.append(Row(*way, measured))
    return rows


def _ways(settings: Settings) -> Iterator[Way]:
    yield None, None
    for basis in settings.bases:
        for budget in settings.budgets:
            if budget != 1.0 or isinstance(budget, int) or basis == settings.bases[0]:  # all is all, whatever it is of
                yield budget, basis


def _budgeted(way: Way) -> tuple[float | int, BudgetOf]:
    budget, basis = way
    assert budget is not None and basis is not None
    return budget, basis


def _progress(console: Console, unit: str) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)
