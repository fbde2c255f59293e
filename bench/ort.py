"""ONNX Runtime: a model exported with the full KV cache against the same model exported with eviction inside.

One process, contenders take turns; medians, their spread and ratios.

    python -m bench.ort --preset llava-next-cpu --layers 2 --batch 1 --budget 0.05 --json out.json
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import onnxruntime
import torch
from torch import Tensor

from bench import record, table
from bench.arguments import add_budget, add_files, parser, preset_of
from bench.errors import BenchError, exit_code
from bench.measure import ANSWER, conditions, say
from bench.models import PATCH, make_model, make_prompt, pictures_of
from bench.presets import Preset
from bench.ratios import spread
from tgvkv_compile.export import OnnxGenerator, export_onnx
from tgvkv_compile.export.manifest import Engine, TensorSpec
from tgvkv_compile.export.onnx.files import write_onnx
from tgvkv_compile.export.trace.families import IDS, MASK, PIXELS, engine_inputs, family_of
from tgvkv_compile.export.trace.rewritten import exported
from tgvkv_compile.export.trace.traced import traced_decode, traced_prefill
from tgvkv_compile.fx.meta import fake_tensor, output_nodes
from tgvkv_compile.passes.drop_assertions import drop_assertions

FULL, STATIC, OURS = "ort-full", "ort-full-static", "ort-tgvkv"
WARM_STEPS = 3


class Runner(Protocol):
    """One request at a time on two sessions of ONNX Runtime."""

    def prefill(self, inputs: dict[str, Tensor]) -> Tensor:
        """Takes a prompt in; logits `[B, vocabulary]`."""

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """A step; logits `[B, vocabulary]`."""

    def kv_bytes(self) -> int:
        """What keys and values occupy now."""


class FullCache:
    """What one would export without this package: a cache that grows by a `Concat` in every step.

    Keys and values stay with the runtime between steps; they are new tensors in each.
    """

    def __init__(self, model: Any, sample: dict[str, Tensor], folder: Path, options: Any) -> None:
        family = family_of(model)
        inputs = engine_inputs(model, family, sample)
        length = inputs[IDS].shape[1]
        dim = torch.export.Dim("prompt", min=2, max=2 * length)
        shapes = [{1: dim} if name in (IDS, MASK) else None for name in inputs]
        prefill = traced_prefill(model, family, inputs, {}, shapes)
        drop_assertions(prefill)  # ONNX has no counterpart of transformers' check of the number of vision tokens
        entries = [fake_tensor(node) for node in output_nodes(prefill)[1:]]
        step, step_inputs = traced_decode(model, family, entries, growing=True)
        self._past = [node.name for node in step.graph.find_nodes(op="placeholder")][2:]
        growing = torch.export.Dim.AUTO
        pasts = [None, None, *({2: growing} for _ in self._past)]
        programs = {
            "prefill": (exported(prefill, list(inputs.values()), shapes), list(inputs)),
            "decode": (exported(step, step_inputs, pasts), ["token", "position", *self._past]),
        }
        outputs = ["logits", *(f"next_{name}" for name in self._past)]
        sessions = {}
        for name, (program, names) in programs.items():
            engine = Engine("", *(tuple(TensorSpec(each, (), "") for each in listed) for listed in (names, outputs)))
            write_onnx(program, engine, folder / f"{name}.onnx")
            sessions[name] = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options)
        self._sessions, self._outputs, self._state = sessions, outputs, []  # type: ignore[var-annotated]

    def prefill(self, inputs: dict[str, Tensor]) -> Tensor:
        """See `Runner`."""
        return self._run("prefill", inputs)

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """See `Runner`."""
        return self._run("decode", {"token": token, "position": position})

    def _run(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        session = self._sessions[name]
        binding = session.io_binding()
        for each, tensor in inputs.items():
            binding.bind_cpu_input(each, numpy.ascontiguousarray(tensor.numpy()))
        if name == "decode":
            for each, value in zip(self._past, self._state, strict=True):
                binding.bind_ortvalue_input(each, value)
        for each in self._outputs:
            binding.bind_output(each, "cpu")
        session.run_with_iobinding(binding)
        logits, *self._state = binding.get_outputs()
        return torch.from_numpy(logits.numpy())

    def kv_bytes(self) -> int:
        """See `Runner`."""
        return sum(value.tensor_size_in_bytes() for value in self._state)


class Exported:
    """What `export_onnx` wrote, run by `OnnxGenerator`."""

    def __init__(self, model: Any, sample: dict[str, Tensor], folder: Path, options: Any, budget: float, steps: int) -> None:
        export_onnx(model, sample, folder, budget, steps)
        self._generator = OnnxGenerator(folder, session_options=options)

    def prefill(self, inputs: dict[str, Tensor]) -> Tensor:
        """See `Runner`."""
        return self._generator.prefill(self._generator.checked(inputs))

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """See `Runner`."""
        return self._generator.decode(token, position)

    def kv_bytes(self) -> int:
        """See `Runner`."""
        return self._generator.manifest.cache_bytes()


def main() -> None:
    """Runs the benchmark, prints its table, and writes JSON where asked to."""
    options = parser(__doc__)
    add_budget(options, "fraction of KV that is kept")
    add_files(options, "json")
    args = options.parse_args()
    preset = preset_of(args)
    if preset.kind != "llava" or preset.device != "cpu":
        raise BenchError(f"preset {args.preset!r} is not a LLaVA on the CPU, which this benchmark is for")
    begun = record.header("bench.ort", args.preset, preset)
    begun["versions"]["onnxruntime"] = onnxruntime.__version__
    model = make_model(preset)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(model, preset, args.budget, Path(folder))
    found = {
        **begun,
        "budget": args.budget,
        **conditions(model, preset),
        "rows": rows,
        "ratios": ratios(rows),
    }
    record.write(found, args.json)
    sys.stdout.write(f"{table.of_run(rows, found['ratios'])}\n")


def inputs_of(model: Any, preset: Preset) -> dict[str, Tensor]:
    """A prompt of the preset's batch, pictures as pixels."""
    ids = make_prompt(model, preset, preset.batch).ids
    count, side = preset.batch * pictures_of(preset), preset.picture_side * PATCH
    pixels = torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(1))
    return {IDS: ids, MASK: torch.ones_like(ids), PIXELS: pixels}


def measured(model: Any, preset: Preset, budget: float, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows: full KV as it grows, full KV in fixed slots (a budget of 1), ours."""
    sample, steps = inputs_of(model, preset), WARM_STEPS + preset.rounds * preset.steps
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    makers = {
        FULL: lambda where: FullCache(model, sample, where, options),
        STATIC: lambda where: Exported(model, sample, where, options, 1.0, steps),
        OURS: lambda where: Exported(model, sample, where, options, budget, steps),
    }
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    for name, make in makers.items():
        say(f"{name}: exports")
        where = folder / name
        where.mkdir()
        begun = time.perf_counter()
        runners[name] = make(where)
        files = sum(path.stat().st_size for path in where.iterdir())
        rows[name] = {"compile_s": time.perf_counter() - begun, "file_bytes": files, "rounds": {}}
    _time_prefill(runners, sample, preset, rows)
    _time_decode(runners, sample, preset, rows)
    for row in rows.values():
        row["spread"] = {key: spread(values) for key, values in row["rounds"].items()}
        row.update({key: statistics.median(values) for key, values in row["rounds"].items()})
        row["tokens_per_s"] = 1e3 * preset.batch * ANSWER / (row["prefill_ms"] + (ANSWER - 1) * row["decode_ms"])
    return rows


def _turns(runners: dict[str, Runner], count: int) -> list[list[str]]:
    names: Sequence[str] = list(runners)
    return [[*names[turn % len(names) :], *names[: turn % len(names)]] for turn in range(count)]


def _time_prefill(
    runners: dict[str, Runner], sample: dict[str, Tensor], preset: Preset, rows: dict[str, dict[str, Any]]
) -> None:
    for number, turn in enumerate(_turns(runners, preset.prefill_rounds + 1)):
        say(f"prefill: round {number} of {preset.prefill_rounds}")
        for name in turn:
            begun = time.perf_counter()
            runners[name].prefill(sample)
            if number:  # the first is for memory and caches
                rows[name]["rounds"].setdefault("prefill_ms", []).append(1e3 * (time.perf_counter() - begun))


def _time_decode(
    runners: dict[str, Runner], sample: dict[str, Tensor], preset: Preset, rows: dict[str, dict[str, Any]]
) -> None:
    tokens = {name: runner.prefill(sample).argmax(1) for name, runner in runners.items()}
    length = torch.full((preset.batch, 1), preset.context)
    taken = dict.fromkeys(runners, 0)

    def steps(name: str, count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            logits = runners[name].decode(tokens[name][:, None], length + taken[name])
            tokens[name] = logits.argmax(1)
            taken[name] += 1
        return (time.perf_counter() - begun) / count

    for name in runners:
        steps(name, WARM_STEPS)
        rows[name]["kv_bytes"] = runners[name].kv_bytes()
    for number, turn in enumerate(_turns(runners, preset.rounds)):
        say(f"decode: round {number + 1} of {preset.rounds}")
        for name in turn:
            rows[name]["rounds"].setdefault("decode_ms", []).append(1e3 * steps(name, preset.steps))


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of ours to the two others; below 1 is better."""
    keys = ("decode_ms", "prefill_ms", "compile_s", "kv_bytes")
    bases = {"full": FULL, "full_static": STATIC}
    return {
        f"{key.rpartition('_')[0] if key != 'kv_bytes' else key}_vs_{short}": rows[OURS][key] / rows[base][key]
        for key in keys
        for short, base in bases.items()
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
