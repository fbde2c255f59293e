"""Runs `prefill.onnx` and `decode.onnx` on ONNX Runtime. The cache stays in its buffers: no step copies it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from tgvkv_compile.errors import ConfigError, first_line
from tgvkv_compile.export.generator import Generator
from tgvkv_compile.export.manifest import MANIFEST, Engine, TensorSpec
from tgvkv_compile.export.onnx.shared_weights import WEIGHTS
from tgvkv_compile.export.trace.families import PIXELS

_CPU = ("CPUExecutionProvider",)
_PING_PONG = ("protect_from", "lengths")  # a step still reads them after it has written their successors


class OnnxGenerator(Generator):
    """`OnnxGenerator(directory).generate(**inputs, max_new_tokens=...)`.

    Keys, values and slot positions are bound as inputs and as outputs to the same memory: a step reads each of them once,
    where it writes the new entry, and goes on with what it has written.
    """

    def __init__(self, directory: str | Path, *, providers: Sequence[str] = _CPU, session_options: Any | None = None) -> None:
        """Loads the engines.

        Args:
            directory: What `export_onnx` wrote.
            providers: Execution providers of ONNX Runtime, the first that can run an operator runs it.
            session_options: `onnxruntime.SessionOptions`, for its threads and the like.

        Raises:
            ConfigError: There is no export in it, or a broken one; ONNX Runtime is not installed, or lacks a provider.
        """
        super().__init__(directory)
        self._runtime = runtime = _onnxruntime()
        lacking = [name for name in providers if name not in runtime.get_available_providers()]
        if lacking:
            raise ConfigError(f"ONNX Runtime has no {', '.join(lacking)} here; it has {runtime.get_available_providers()}")
        self._device = "cuda" if providers[0].startswith(("CUDA", "Tensorrt")) else "cpu"
        engines = self.manifest.engines.values()
        missing = [engine.file for engine in engines if not (self.folder / engine.file).is_file()]
        if missing:
            raise ConfigError(f"{self.folder} lacks {', '.join(missing)}; export the model again")
        options = session_options or _quiet(runtime)
        self._prefill, self._decode, *self._vision = (
            _session(runtime, self.folder / engine.file, engine, options, list(providers)) for engine in engines
        )
        self._state: dict[str, Any] = {}
        self._steps: list[Any] = []

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """See `Generator.encode`."""
        assert self.manifest.vision is not None
        (encoder,), names = self._vision, [spec.name for spec in self.manifest.vision.outputs]
        found = encoder.run(names, {PIXELS: _numpy(pixels)})
        return {name: torch.from_numpy(features) for name, features in zip(names, found, strict=True)}

    def _run_prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._state, self._steps = {}, []
        binding = self._prefill.io_binding()
        for name, tensor in inputs.items():
            binding.bind_cpu_input(name, _numpy(tensor))
        for spec in self.manifest.prefill.outputs:
            binding.bind_output(spec.name, "cpu" if spec.name == "logits" else self._device)
        self._prefill.run_with_iobinding(binding)
        found = dict(zip((spec.name for spec in self.manifest.prefill.outputs), binding.get_outputs(), strict=True))
        logits = found.pop("logits")
        self._state = {name.removeprefix("next_"): value for name, value in found.items()}
        return torch.from_numpy(logits.numpy())

    def _run_decode(self, token: Tensor, position: Tensor, taken: int) -> Tensor:
        if not self._steps:
            self._steps = self._bound_steps()
        binding, logits = self._steps[taken % 2]
        binding.bind_cpu_input("token", _numpy(token))
        binding.bind_cpu_input("position", _numpy(position))
        self._decode.run_with_iobinding(binding)
        return torch.from_numpy(logits.numpy())

    def _bound_steps(self) -> list[Any]:
        """Two bindings in turn: what one writes of the small tensors the other reads; the large ones are the same in both."""
        specs = {spec.name.removeprefix("next_"): spec for spec in self.manifest.decode.outputs}
        other = {**self._state, **{name: self._empty(specs[name]) for name in _PING_PONG}}
        bound = []
        for reads, writes in ((self._state, other), (other, self._state)):
            logits = self._empty(specs["logits"], "cpu")
            binding = self._decode.io_binding()
            for name, value in reads.items():
                binding.bind_ortvalue_input(name, value)
            for name, spec in specs.items():
                binding.bind_ortvalue_output(spec.name, logits if name == "logits" else writes[name])
            bound.append((binding, logits))
        return bound

    def _empty(self, spec: TensorSpec, device: str | None = None) -> Any:
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(
            list(spec.shape), numpy.dtype(spec.dtype).type, device or self._device
        )

    def slot_positions(self) -> tuple[Tensor, ...]:
        """See `Generator.slot_positions`."""
        names = [f"slot_position_{layer}" for layer in range(self.manifest.plan.num_layers)]
        return tuple(torch.from_numpy(self._state[name].numpy()) for name in names)

    def cache_bytes(self) -> int:
        """What the buffers of the cache hold, all of them: 0 before a prefill."""
        return sum(value.tensor_size_in_bytes() for value in self._state.values())


def _quiet(runtime: Any) -> Any:
    """Options without what a session logs of an error beside raising it."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    return options


def _session(runtime: Any, path: Path, engine: Engine, options: Any, providers: list[str]) -> Any:
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime has a class for each kind, and no common one
        lacking = "" if (path.parent / WEIGHTS).is_file() else f"{path.parent} lacks {WEIGHTS}; "
        raise ConfigError(f"{lacking}ONNX Runtime cannot load {path}: {first_line(error)}; export the model again") from error
    for what, found, specs in (
        ("inputs", session.get_inputs(), engine.inputs),
        ("outputs", session.get_outputs(), engine.outputs),
    ):
        here = {each.name: each for each in found}
        named = {spec.name: spec for spec in specs}
        odd = sorted(here.keys() ^ named.keys()) or [name for name, spec in named.items() if not _is_of(here[name], spec)]
        if odd:
            raise ConfigError(
                f"{path} is not the engine that {MANIFEST} beside it describes: {what} differ in {', '.join(odd[:3])}"
                f"{', ...' if len(odd) > 3 else ''}; export the model again"
            )
    return session


def _is_of(found: Any, spec: TensorSpec) -> bool:
    """Whether an input or output has the dtype and, where both know them, the sizes that the manifest says."""
    sizes = zip(found.shape, spec.shape, strict=False)
    fits = len(found.shape) == len(spec.shape) and all(
        here == there for here, there in sizes if isinstance(here, int) and isinstance(there, int)
    )
    return fits and found.type == f"tensor({_TYPES.get(spec.dtype, spec.dtype)})"


_TYPES = {"float32": "float", "float64": "double"}
"""ONNX Runtime's names of dtypes, where they are not torch's."""


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError("running ONNX files needs ONNX Runtime: pip install onnxruntime (or onnxruntime-gpu)") from error
    return onnxruntime
