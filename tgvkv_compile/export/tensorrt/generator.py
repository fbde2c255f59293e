"""Runs `prefill.engine` and `decode.engine` on TensorRT. Nothing here has run on TensorRT yet (`docs/export.md`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.errors import CacheError, ConfigError
from tgvkv_compile.export.generator import Generator
from tgvkv_compile.export.manifest import PROMPT, Engine, TensorSpec
from tgvkv_compile.export.tensorrt.engines import ENGINE
from tgvkv_compile.export.trace.families import PIXELS


class TensorRTGenerator(Generator):
    """`TensorRTGenerator(directory).generate(**inputs, max_new_tokens=...)`.

    The cache is held twice: a step reads one half and writes the other, because TensorRT does not allow that an output lies
    where an input does.
    """

    def __init__(self, directory: str | Path, *, device: str | torch.device = "cuda") -> None:
        """Loads the engines.

        Args:
            directory: What `export_tensorrt` wrote, or `export_onnx` and the commands of `trtexec_commands` after it.
            device: Where they run.

        Raises:
            ConfigError: There is no export in it, TensorRT is not installed, or an engine does not suit this machine.
        """
        super().__init__(directory)
        self._device = torch.device(device)
        tensorrt = _tensorrt()
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        manifest = self.manifest
        self._prefill = _Runner(tensorrt, runtime, self.folder, manifest.prefill, self._device)
        self._decode = _Runner(tensorrt, runtime, self.folder, manifest.decode, self._device)
        self._vision = None
        if manifest.vision is not None:
            self._vision = _Runner(tensorrt, runtime, self.folder, manifest.vision, self._device)
        self._state: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """See `Generator.encode`."""
        assert self._vision is not None
        return {name: value.cpu() for name, value in self._vision.run({PIXELS: pixels}, {}).items()}

    def _run_prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        found = self._prefill.run(inputs, {})
        logits = found.pop("logits")
        self._state = {name.removeprefix("next_"): value for name, value in found.items()}
        self._spare = {name: torch.empty_like(value) for name, value in self._state.items() if name != "keep_rate"}
        return logits

    def _run_decode(self, token: Tensor, position: Tensor, taken: int) -> Tensor:
        written = {f"next_{name}": value for name, value in self._spare.items()}
        found = self._decode.run({"token": token, "position": position, **self._state}, written)
        read, self._state = self._state, {**self._spare, "keep_rate": self._state["keep_rate"]}
        self._spare = {name: read[name] for name in self._spare}
        return found["logits"]

    def slot_positions(self) -> tuple[Tensor, ...]:
        """See `Generator.slot_positions`."""
        return tuple(self._state[f"slot_position_{layer}"].cpu() for layer in range(self.manifest.plan.num_layers))


class _Runner:
    """One engine, its context, and which of its tensors are which of the manifest's."""

    def __init__(self, tensorrt: Any, runtime: Any, folder: Path, engine: Engine, device: torch.device) -> None:
        path = (folder / engine.file).with_suffix(ENGINE)
        if not path.is_file():
            raise ConfigError(f"{folder} lacks {path.name}; export_tensorrt writes it, or the commands of trtexec_commands do")
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ConfigError(
                f"TensorRT cannot load {path}; engines suit the version and the GPU they were built with: export again"
            )
        self._context = self._engine.create_execution_context()
        self._device, self._specs = device, engine
        names = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        self._inputs = _named(inputs, engine.inputs, path)
        self._outputs = _named([name for name in names if name not in inputs], engine.outputs, path)

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One execution, finished when it returns.

        Args:
            inputs: By the manifest's names; what is elsewhere is copied to the device.
            outputs: Where to write some of the outputs; others get new tensors.

        Returns:
            All outputs, by the manifest's names.
        """
        given: dict[str, Tensor] = {}
        for spec in self._specs.inputs:
            tensor = inputs[spec.name].to(self._device, getattr(torch, spec.dtype)).contiguous()
            given[spec.name] = tensor
            if PROMPT in spec.shape:
                self._context.set_input_shape(self._inputs[spec.name], tuple(tensor.shape))
            self._context.set_tensor_address(self._inputs[spec.name], tensor.data_ptr())
        made: dict[str, Tensor] = {}
        for spec in self._specs.outputs:
            found = outputs.get(spec.name)
            made[spec.name] = self._new(spec) if found is None else found
            self._context.set_tensor_address(self._outputs[spec.name], made[spec.name].data_ptr())
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        if not self._context.execute_async_v3(stream):
            raise CacheError("TensorRT could not run an engine; its log tells why")
        if on_gpu:
            torch.cuda.current_stream(self._device).synchronize()
        return made

    def _new(self, spec: TensorSpec) -> Tensor:
        size = [int(length) for length in spec.shape]
        return torch.empty(size, dtype=getattr(torch, spec.dtype), device=self._device)


def _named(found: list[str], specs: tuple[TensorSpec, ...], path: Path) -> dict[str, str]:
    """The engine's name of each of the manifest's tensors: the same, or by their order.

    Torch-TensorRT names outputs `output0`, `output1`, ...; trtexec keeps the names of the ONNX file.
    """
    names = [spec.name for spec in specs]
    if set(names) == set(found):
        return {name: name for name in names}
    if len(found) != len(names):
        raise ConfigError(f"{path} has the tensors {', '.join(found)}, the manifest names {', '.join(names)}: export again")
    return dict(zip(names, found, strict=True))


def _tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise ConfigError("running engines needs TensorRT: pip install tensorrt, on a machine with an NVIDIA GPU") from error
    return tensorrt
