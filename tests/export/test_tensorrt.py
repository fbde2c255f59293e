"""What can be checked of the TensorRT path without TensorRT: a stand-in runs the exported programs where engines would run."""

import ctypes
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.export.engines import compiled_answer
from tests.families.family import make_inputs as family_inputs
from tests.families.family import make_model as family_model
from tests.families.table import FAMILIES
from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile.errors import CacheError, ConfigError, UnsupportedGraphError
from tgvkv_compile.export import (
    Manifest,
    TensorRTGenerator,
    export_onnx,
    export_tensorrt,
    trtexec_commands,
)

NEW = 8
SAMPLE = make_inputs([(5, 9), (3, 6)])
DTYPES = {torch.float32: ctypes.c_float, torch.int64: ctypes.c_int64}


class Engine:
    """Runs an exported program on the addresses that it is given, as an execution context does."""

    def __init__(self, serialized: bytes) -> None:
        program = torch.export.load(io.BytesIO(serialized))
        self.run = program.module()
        self.inputs = list(program.graph_signature.user_inputs)
        values = {node.name: node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
        self.input_values = [values[name] for name in self.inputs]
        self.output_values = [values[name] for name in program.graph_signature.user_outputs]
        # Outputs first: what is what must be asked of the engine.
        self.names = [*(f"output{place}" for place in range(len(self.output_values))), *self.inputs]
        self.num_io_tensors = len(self.names)
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, place: int) -> str:
        return self.names[place]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def create_execution_context(self) -> "Engine":
        return self

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0
        given = [self._at(name, value) for name, value in zip(self.inputs, self.input_values, strict=True)]
        places = [self.addresses[f"output{place}"] for place in range(len(self.output_values))]
        assert not set(places) & {tensor.data_ptr() for tensor in given}, "an output lies where an input does"
        with torch.no_grad():
            found = self.run(*(tensor.clone() for tensor in given))
        for place, (value, result) in enumerate(zip(self.output_values, found, strict=True)):
            self._at(f"output{place}", value).copy_(result)
        return True

    def _at(self, name: str, like: Tensor) -> Tensor:
        size = [int(length) for length in like.shape]
        count = max(1, torch.Size(size).numel())
        memory = (DTYPES[like.dtype] * count).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=like.dtype).reshape(size)


def _convert(program: torch.export.ExportedProgram, *, arg_inputs: list[Tensor], **settings: Any) -> bytes:
    assert settings["require_full_compilation"] and settings["disable_tf32"]
    assert not any(isinstance(size, torch.SymInt) for tensor in arg_inputs for size in tensor.shape)
    program.module()(*arg_inputs)  # they suit
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_tensorrt, tensorrt = ModuleType("torch_tensorrt"), ModuleType("tensorrt")
    torch_tensorrt.dynamo = SimpleNamespace(  # type: ignore[attr-defined]
        convert_exported_program_to_serialized_trt_engine=_convert
    )
    tensorrt.Logger = type("Logger", (), {"WARNING": 0, "__init__": lambda *_: None})  # type: ignore[attr-defined]
    tensorrt.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")  # type: ignore[attr-defined]

    class Runtime:
        def __init__(self, _: Any) -> None:
            pass

        def deserialize_cuda_engine(self, serialized: bytes) -> Engine | None:
            return None if serialized == b"of another version" else Engine(serialized)

    tensorrt.Runtime = Runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", torch_tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)


def test_engines_give_the_tokens_of_the_compiled_path(stand_ins: None, tmp_path: Path) -> None:
    model = make_model(Shape(layers=2))
    export_tensorrt(model, SAMPLE, tmp_path, 0.3, NEW, max_prompt=48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.engine", "manifest.json", "prefill.engine"]
    generator = TensorRTGenerator(tmp_path, device="cpu")
    others = make_inputs([(2, 3), (1, 20)], seed=3)
    for inputs in (SAMPLE, others, SAMPLE):
        found = generator.generate(**inputs, max_new_tokens=NEW)
        assert torch.equal(found, compiled_answer(model, inputs, 0.3, NEW))
    assert all(len(generator.kept_positions(layer, 1)) > 4 for layer in range(2))
    token = torch.zeros(2, 1, dtype=torch.int64)
    generator.decode(token, token + 50)
    with pytest.raises(CacheError, match=f"{NEW} decode steps"):
        generator.decode(token, token + 51)

    (tmp_path / "decode.engine").write_bytes(b"of another version")
    with pytest.raises(ConfigError, match="cannot load"):
        TensorRTGenerator(tmp_path, device="cpu")
    (tmp_path / "decode.engine").unlink()
    with pytest.raises(ConfigError, match=r"lacks decode\.engine"):
        TensorRTGenerator(tmp_path, device="cpu")


def test_a_vision_encoder(stand_ins: None, tmp_path: Path) -> None:
    family = FAMILIES["qwen3_vl"]
    model = family_model(family)
    inputs = family_inputs(family, model, ((6, "image", 9),))
    export_tensorrt(model, inputs, tmp_path, 0.4, NEW)
    found = TensorRTGenerator(tmp_path, device="cpu").generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(found, compiled_answer(model, inputs, 0.4, NEW))


def test_an_engine_that_cannot_be_built(stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("no tactic")

    monkeypatch.setattr(sys.modules["torch_tensorrt"].dynamo, "convert_exported_program_to_serialized_trt_engine", refuse)
    with pytest.raises(UnsupportedGraphError, match=r"prefill\.engine: no tactic"):
        export_tensorrt(make_model(Shape(layers=1)), SAMPLE, tmp_path / "new", 0.3, NEW)
    assert not (tmp_path / "new").exists()


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_tensorrt", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install torch-tensorrt"):
        export_tensorrt(make_model(Shape(layers=1)), SAMPLE, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _manifest(tmp_path)
    with pytest.raises(ConfigError, match="pip install tensorrt"):
        TensorRTGenerator(tmp_path)


def _manifest(folder: Path) -> Manifest:
    """An export to ONNX whose files are not written: what they hold is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgvkv_compile.export.onnx.files.write_onnx", lambda program, engine, path: path.write_text(""))
        patch.setattr("tgvkv_compile.export.onnx.files.share_weights", lambda *_: 0)
        patch.setattr("onnx.checker.check_model", lambda *_, **__: None)
        patch.setattr("tgvkv_compile.export.program.block_count", lambda *_: 2)
        return export_onnx(make_model(Shape(layers=1)), SAMPLE, folder, 0.3, NEW, max_prompt=64)


def test_the_commands_of_trtexec(tmp_path: Path) -> None:
    _manifest(tmp_path)
    prefill, decode = trtexec_commands(tmp_path)
    assert prefill.split() == [
        "trtexec",
        f"--onnx={tmp_path}/prefill.onnx",
        f"--saveEngine={tmp_path}/prefill.engine",
        "--noTF32",
        "--skipInference",
        "--minShapes=input_ids:2x4,attention_mask:2x4",
        "--optShapes=input_ids:2x64,attention_mask:2x64",
        "--maxShapes=input_ids:2x64,attention_mask:2x64",
    ]
    assert "Shapes" not in decode and "decode.onnx" in decode
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace(".onnx", ".engine"))
    with pytest.raises(ConfigError, match="trtexec takes what export_onnx wrote"):
        trtexec_commands(tmp_path)
