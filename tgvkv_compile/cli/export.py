"""`tgvkv export` and `tgvkv run --onnx`: engines from a model, and an answer from engines."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoProcessor

from tgvkv_compile.backend.explanation import size
from tgvkv_compile.backend.request import blank_image
from tgvkv_compile.cli.inputs import Loaded, build_inputs, quiet_transformers
from tgvkv_compile.cli.problems import CommandError
from tgvkv_compile.errors import ConfigError, first_line
from tgvkv_compile.export import Manifest, OnnxGenerator, export_onnx, export_tensorrt, trtexec_commands
from tgvkv_compile.export.manifest import MANIFEST
from tgvkv_compile.export.staging import output_folder
from tgvkv_compile.export.trace.suitable import check_dtype

PROCESSOR = "processor"
_EXPORTERS: dict[str, Callable[..., Manifest]] = {"onnx": export_onnx, "tensorrt": export_tensorrt}


def check_folder(out: Path) -> None:
    """Raises [`CommandError`][] for a folder that cannot be made or written to, or holds something else than an export."""
    if not out.absolute().parent.exists():
        raise CommandError(f"no such folder: {out.parent}; --out {out} makes one folder in a folder that is there")
    try:
        output_folder(out)
    except ConfigError as error:
        raise CommandError(f"--out {str(error).removeprefix('directory=')}") from None
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise CommandError(f"--out {out} holds files and no export; give an empty folder, or a new one")


def check_weights(dtype: str) -> None:
    """Raises [`CommandError`][] for a `--dtype` that no engine can be made in."""
    if dtype == "auto":
        return
    try:
        check_dtype(getattr(torch, dtype))
    except ConfigError as error:
        raise CommandError(f"--dtype {dtype}: {error}") from None


def export(
    target: str,
    loaded: Loaded,
    images: Sequence[Image.Image],
    prompt: str,
    out: Path,
    budget: float | int | None,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Exports a model with its processor, and says what came of it.

    Args:
        target: `"onnx"` or `"tensorrt"`.
        loaded: The model and its processor.
        images: Pictures of the sample; a blank one where there are none.
        prompt: Question of the sample.
        out: Folder to write to.
        budget: KV kept.
        max_new_tokens: Longest answer.
        options: Others of `export_program`.
    """
    sample = dict(build_inputs(loaded, images or [blank_image()], prompt))
    with _quietly(), _told() as say:
        manifest = _EXPORTERS[target](loaded.model, sample, out, budget, max_new_tokens, say=say, **options)
        loaded.processor.save_pretrained(out / PROCESSOR)
    typer.echo("\n".join(summary(manifest, out)))
    if target == "onnx":
        typer.echo(f'run it: tgvkv run --onnx {out} --image FILE --prompt "..."')
        typer.echo("TensorRT engines of it, on a machine with TensorRT:")
        typer.echo("\n".join(f"  {command}" for command in trtexec_commands(out)))


def summary(manifest: Manifest, out: Path) -> list[str]:
    """What an export holds, as lines of text."""
    plan = manifest.plan
    files = [f"{path.name} {size(path.stat().st_size)}" for path in sorted(out.iterdir()) if path.is_file()]
    held, full = manifest.cache_bytes(), manifest.full_bytes()
    slots = plan.capacities
    return [
        f"{out}: {', '.join(files)}",
        f"  batch {manifest.batch_size}, prompts of up to {plan.max_prompt} tokens with {manifest.vision_tokens} vision "
        f"tokens, answers of up to {plan.max_new_tokens}",
        f"  slots per layer: {min(slots)} to {max(slots)}, {sum(slots) / len(slots):.0f} on average, in {len(slots)} layers",
        f"  KV held between steps: {size(held)} of {size(full)} ({held / full:.1%})",
    ]


def answer_from_onnx(folder: Path, images: Sequence[Image.Image], prompt: str, max_new_tokens: int | None) -> None:
    """Runs an export to ONNX and prints the answer.

    Raises:
        CommandError: There is no processor beside it.
    """
    generator = OnnxGenerator(folder)
    processor = _processor(folder)
    inputs = build_inputs(Loaded(_Where(), processor), images, prompt)
    sequences = generator.generate(**dict(inputs), max_new_tokens=max_new_tokens)
    tokenizer = getattr(processor, "tokenizer", processor)
    typer.echo(tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    held, full = generator.manifest.cache_bytes(), generator.manifest.full_bytes()
    typer.echo(f"KV cache: {generator.manifest.plan.num_layers} layers, {size(held)} of {size(full)} ({held / full:.1%})")


class _Where:
    """In place of a model: where its inputs go, and in which dtype."""

    device = torch.device("cpu")
    dtype = torch.float32


def _processor(folder: Path) -> Any:
    where = folder / PROCESSOR
    if not where.is_dir():
        raise CommandError(
            f"{folder} has no folder {PROCESSOR!r}: `tgvkv export onnx` writes one; save the model's processor there"
        )
    with quiet_transformers():
        try:
            return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                where, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers and tokenizers each have their own for a folder that is broken
            raise CommandError(f"cannot load the processor in {where}: {first_line(error)}") from None


@contextmanager
def _told() -> Iterator[Callable[[str], None]]:
    """Shows what is being done, and for how long: a line that moves on a terminal, a line each elsewhere."""
    console = Console(stderr=True, highlight=False)
    begun = time.perf_counter()
    if not console.is_terminal:
        yield lambda what: console.print(f"[{time.perf_counter() - begun:6.1f} s] {what}", markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda what: progress.update(task, description=what)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences what torch's exporters say to their own developers."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
