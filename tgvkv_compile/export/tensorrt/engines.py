"""An exported model as TensorRT engines: through Torch-TensorRT, or by `trtexec` from the ONNX files.

Nothing here has run on TensorRT yet (`docs/export.md`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgvkv_compile.errors import ConfigError, UnsupportedGraphError, first_line
from tgvkv_compile.export.manifest import PROMPT, Engine, Manifest
from tgvkv_compile.export.program import Say, export_program
from tgvkv_compile.export.staging import output_folder, staged

ENGINE = ".engine"


def export_tensorrt(
    model: Any,
    sample_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    directory: str | Path,
    budget: float | int | None = None,
    max_new_tokens: int = 128,
    *,
    engine_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Manifest:
    """Writes `prefill.engine`, `decode.engine`, for some families `vision.engine`, and `manifest.json`.

    Prompts are padded to the longest: not all of Torch-TensorRT's converters take dynamic lengths (`trtexec_commands` does
    without that). Engines compute in the dtypes of the model; float32 is float32, not TF32, which would round the scores.

    Args:
        model: As for [`export_program`][tgvkv_compile.export.program.export_program], and so are the others; on a CUDA device.
        sample_inputs: As there.
        directory: Where to; it is made. Files of an earlier export in it are replaced.
        budget: As there.
        max_new_tokens: As there.
        engine_options: Further arguments of `torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine`.
        **options: As there, but for `fixed_prompt`.

    Returns:
        What `manifest.json` says.

    Raises:
        ConfigError: An option cannot be used, or Torch-TensorRT is not installed.
        UnsupportedGraphError: The model cannot be exported, or an engine cannot be built.
    """
    torch_tensorrt = torch_tensorrt_module()
    folder = output_folder(directory)
    say: Say = options.get("say") or (lambda _: None)
    programs = export_program(model, sample_inputs, budget, max_new_tokens, **{**options, "fixed_prompt": True})
    built: dict[str, Any] = {}
    with staged(folder) as staging:
        for name, engine in programs.manifest.engines.items():
            say(f"building {name}{ENGINE}")
            # By default masks of one kind of attention are taken for causal ones, whatever they say.
            exact = {"require_full_compilation": True, "disable_tf32": True, "attn_bias_is_causal": False}
            settings = {**exact, **(engine_options or {})}
            try:
                serialized = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                    getattr(programs, name), arg_inputs=list(getattr(programs, f"{name}_inputs")), **settings
                )
            except Exception as error:  # Torch-TensorRT has no common class of errors
                raise UnsupportedGraphError(f"Torch-TensorRT cannot build {name}{ENGINE}: {first_line(error)}") from error
            (staging / f"{name}{ENGINE}").write_bytes(serialized)
            built[name] = dataclasses.replace(engine, file=f"{name}{ENGINE}")
        manifest = dataclasses.replace(programs.manifest, **built)
        manifest.write(staging)
    return manifest


def torch_tensorrt_module() -> Any:
    """`torch_tensorrt`.

    Raises:
        ConfigError: It, or TensorRT itself, is not installed.
    """
    try:
        import torch_tensorrt
    except (ImportError, OSError) as error:  # the wheel without TensorRT's libraries fails either way
        raise ConfigError(
            f"TensorRT engines need torch-tensorrt and TensorRT ({first_line(error)}): pip install torch-tensorrt "
            "tensorrt, on a machine with an NVIDIA GPU. Files for other runtimes: export_onnx"
        ) from error
    return torch_tensorrt


def trtexec_commands(directory: str | Path) -> list[str]:
    """The commands that make engines of the ONNX files which `export_onnx` wrote; `TensorRTGenerator` then runs them.

    Prompts of every length are taken; the longest is what an engine is tuned for.

    Raises:
        ConfigError: There is no export to ONNX in it.
    """
    folder = Path(directory)
    manifest = Manifest.read(folder)
    engines = list(manifest.engines.values())
    if any(not engine.file.endswith(".onnx") for engine in engines):
        raise ConfigError(
            f"{folder} holds {', '.join(engine.file for engine in engines)}; trtexec takes what export_onnx wrote"
        )
    return [_trtexec(folder, engine, manifest) for engine in engines]


def _trtexec(folder: Path, engine: Engine, manifest: Manifest) -> str:
    source = folder / engine.file
    parts = ["trtexec", f"--onnx={source}", f"--saveEngine={source.with_suffix(ENGINE)}", "--noTF32", "--skipInference"]
    free = [spec for spec in engine.inputs if PROMPT in spec.shape]
    lengths = manifest.prompt_lengths
    for name, length in (("min", lengths.least), ("opt", lengths.most), ("max", lengths.most)):
        shapes = [f"{spec.name}:{'x'.join(str(length if size == PROMPT else size) for size in spec.shape)}" for spec in free]
        if shapes:
            parts.append(f"--{name}Shapes={','.join(shapes)}")
    return " ".join(parts)
