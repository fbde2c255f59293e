"""An exported model as ONNX files that ONNX Runtime runs and that TensorRT's parser takes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tgvkv_compile.errors import ConfigError, UnsupportedGraphError, first_line
from tgvkv_compile.export.manifest import Engine, Manifest
from tgvkv_compile.export.onnx.shared_weights import share_weights
from tgvkv_compile.export.program import Say, export_program
from tgvkv_compile.export.staging import output_folder, staged

OPSET = 20
"""The newest that TensorRT 10's parser takes."""


def export_onnx(
    model: Any,
    sample_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    directory: str | Path,
    budget: float | int | None = None,
    max_new_tokens: int = 128,
    **options: Any,
) -> Manifest:
    """Writes `prefill.onnx`, `decode.onnx`, for some families `vision.onnx`, and `manifest.json`.

    Weights are in `weights.data`, those that prefill and decode share once.

    Args:
        model: As for [`export_program`][tgvkv_compile.export.program.export_program], and so are the others.
        sample_inputs: As there.
        directory: Where to; it is made. Files of an earlier export in it are replaced.
        budget: As there.
        max_new_tokens: As there.
        **options: As there.

    Returns:
        What `manifest.json` says.

    Raises:
        ConfigError: An option cannot be used, or the packages for ONNX are not installed.
        UnsupportedGraphError: The model cannot be exported.
    """
    onnx = _onnx()
    folder = output_folder(directory)
    say: Say = options.get("say") or (lambda _: None)
    programs = export_program(model, sample_inputs, budget, max_new_tokens, **options)
    manifest = programs.manifest
    engines: dict[str, Any] = {}
    with staged(folder) as staging:
        for name, engine in manifest.engines.items():
            file = f"{name}.onnx"
            say(f"writing {file}")
            write_onnx(getattr(programs, name), engine, staging / file)
            engines[name] = dataclasses.replace(engine, file=file)
        share_weights(staging, [engine.file for engine in engines.values()])
        for engine in engines.values():
            _check(onnx, staging / engine.file)
        manifest = dataclasses.replace(manifest, **engines)
        manifest.write(staging)
    return manifest


def write_onnx(program: torch.export.ExportedProgram, engine: Engine, path: Path) -> None:
    """Writes a program, its inputs and outputs named as the engine says.

    Raises:
        UnsupportedGraphError: An operation has no counterpart in ONNX.
    """
    try:
        made = torch.onnx.export(
            program,
            input_names=[spec.name for spec in engine.inputs],
            output_names=[spec.name for spec in engine.outputs],
            opset_version=OPSET,
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedGraphError(f"torch.onnx cannot write {path.name}: {first_line(error)}") from error
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: larger than the graph, with the paths of this machine
    made.save(str(path), external_data=True)


def _check(onnx: Any, path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedGraphError(f"torch.onnx wrote a {path.name} that is not valid: {first_line(error)}") from error


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}: pip install 'tgvkv-compile[onnx]'") from error
    return onnx
