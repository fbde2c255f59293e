"""Exports that are broken, half there, or of something else: each costs one line that names the file and the remedy."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.export import Manifest, OnnxGenerator, export_onnx, trtexec_commands

SAMPLE = make_inputs([(5, 9)])
Breakage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "engines"
    export_onnx(make_model(Shape(layers=2)), SAMPLE, folder, 0.4, 6)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "engines"))


def cut(name: str, part: float) -> Breakage:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: int((folder / name).stat().st_size * part)]
    )


def becomes_a_folder(name: str) -> Breakage:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def another_model(folder: Path) -> None:
    float32 = onnx.TensorProto.FLOAT
    taken, given = (onnx.helper.make_tensor_value_info(name, float32, [1]) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [taken], [given])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(made, str(folder / "prefill.onnx"))


def swapped(folder: Path) -> None:
    (folder / "prefill.onnx").rename(folder / "other")
    (folder / "decode.onnx").rename(folder / "prefill.onnx")
    (folder / "other").rename(folder / "decode.onnx")


FILES: dict[str, tuple[Breakage, str]] = {
    "half a prefill": (cut("prefill.onnx", 0.5), "ONNX Runtime cannot load .*prefill.onnx"),
    "a prefill without its end": (cut("prefill.onnx", 0.99), "ONNX Runtime cannot load .*prefill.onnx"),
    "an empty decode": (cut("decode.onnx", 0), "ONNX Runtime cannot load .*decode.onnx"),
    "text": (lambda folder: (folder / "decode.onnx").write_text("not a graph"), "ONNX Runtime cannot load .*decode.onnx"),
    "noise": (lambda folder: (folder / "decode.onnx").write_bytes(os.urandom(5000)), "ONNX Runtime cannot load .*decode.onnx"),
    "no prefill": (lambda folder: (folder / "prefill.onnx").unlink(), "lacks prefill.onnx"),
    "a folder for a decode": (becomes_a_folder("decode.onnx"), "lacks decode.onnx"),
    "another model": (another_model, "prefill.onnx is not the engine that manifest.json beside it describes: inputs differ in"),
    "swapped": (swapped, "prefill.onnx is not the engine that manifest.json beside it describes"),
    "no weights": (lambda folder: (folder / "weights.data").unlink(), "lacks weights.data; ONNX Runtime cannot load"),
    "half the weights": (cut("weights.data", 0.5), "ONNX Runtime cannot load"),
    "empty weights": (cut("weights.data", 0), "ONNX Runtime cannot load"),
    "a folder for weights": (becomes_a_folder("weights.data"), "lacks weights.data"),
}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text, text
    return text


@pytest.mark.parametrize("how", FILES)
def test_broken_files(how: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, message = FILES[how]
    change(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        OnnxGenerator(folder)
    assert "export the model again" in one_line(caught.value)
    assert capfd.readouterr().err == ""  # nothing from the runtime's own log


def at(*path: Any) -> Callable[[Any], Breakage]:
    """Puts a value at a place of the manifest."""

    def put(value: Any) -> Breakage:
        def change(folder: Path) -> None:
            read = json.loads((folder / "manifest.json").read_text())
            place = read
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = value
            (folder / "manifest.json").write_text(json.dumps(read))

        return change

    return put


def without(*path: Any) -> Breakage:
    def change(folder: Path) -> None:
        read = json.loads((folder / "manifest.json").read_text())
        place = read
        for part in path[:-1]:
            place = place[part]
        del place[path[-1]]
        (folder / "manifest.json").write_text(json.dumps(read))

    return change


def says(text: str) -> Breakage:
    return lambda folder: (folder / "manifest.json").write_text(text)


MANIFESTS: dict[str, tuple[Breakage, str]] = {
    "none": (lambda folder: (folder / "manifest.json").unlink(), "there is no .*manifest.json; give the folder"),
    "a folder": (becomes_a_folder("manifest.json"), "manifest.json is a folder, not a file"),
    "half of it": (cut("manifest.json", 0.5), "is not JSON"),
    "empty": (says(""), "is not JSON"),
    "bytes": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00\x81"), "is not JSON"),
    "deep": (says("[" * 100_000), "is not JSON"),
    "a list": (says("[]"), "not of the format"),
    "of another version": (at("format")("tgvkv-export-2"), "not of the format"),
    "a field less": (without("batch_size"), "fields: batch_size"),
    "a field more": (at("more")(1), "fields: more"),
    "a plan of nothing": (at("plan")(None), "manifest.json: the budget plan has format='NoneType'"),
    "capacities of no number": (at("plan", "capacities", 0)("much"), r"capacities\[0\]='much' must be an int"),
    "a layer less": (without("plan", "capacities", 0), "keys of 2 layers, the plan has capacities for 1"),
    "other slots": (at("plan", "capacities", 1)(300), "key_1 of decode has .* slots, the plan has 300"),
    "no prefill": (at("prefill")(None), "prefill is 'None', not an object"),
    "a file of no name": (at("prefill", "file")(3), "prefill: file is '3', not a string"),
    "an empty name": (at("decode", "file")(""), "decode has file='', which names no file in this folder"),
    "a file elsewhere": (at("decode", "file")("../decode.onnx"), "which names no file in this folder"),
    "no inputs": (at("prefill", "inputs")(None), "prefill: inputs is 'None', not a list"),
    "an input of no fields": (
        at("prefill", "inputs", 0)({}),
        r"inputs\[0\] lacks, or has too many, fields: dtype, name, shape",
    ),
    "a shape of letters": (at("prefill", "inputs", 0, "shape")("ab"), r"inputs\[0\]: shape is 'ab', not a list"),
    "a nested shape": (at("prefill", "inputs", 0, "shape")([[1]]), r"shape\[0\] is '\[1\]', not an int or a string"),
    "no dtype": (at("prefill", "inputs", 0, "dtype")("floaty"), "input_ids of prefill has dtype='floaty'"),
    "something else for a dtype": (at("prefill", "inputs", 0, "dtype")("nn"), "input_ids of prefill has dtype='nn'"),
    "a vision that is none": (at("vision")(3), "vision is '3', not an object"),
    "no multiple": (at("prompt_lengths", "multiple")(0), "prompt_lengths: multiple=0 must be an int >= 1"),
    "lengths the wrong way": (at("prompt_lengths", "most")(0), "prompt_lengths: most=0 must be an int >="),
    "a batch of words": (at("batch_size")("one"), "batch_size is 'one', not an int"),
    "a batch of truth": (at("batch_size")(True), "batch_size is 'True', not an int"),
    "a batch of none": (at("batch_size")(0), "batch_size=0 must be an int >= 1"),
    "an end of letters": (at("eos_token_ids")(["a"]), r"eos_token_ids\[0\] is 'a', not an int"),
    "no padding": (at("pad_token_id")(None), "pad_token_id is 'None', not an int"),
    "constants in a list": (at("constants")([]), r"constants is '\[\]', not an object"),
    "a version of no text": (at("versions", "torch")(2), "versions.torch is '2', not a string"),
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_broken_manifests(how: str, folder: Path) -> None:
    change, message = MANIFESTS[how]
    change(folder)
    for read in (Manifest.read, OnnxGenerator, trtexec_commands):
        with pytest.raises(ConfigError, match=message) as caught:
            read(folder)
        assert "manifest.json" in one_line(caught.value)


SPECS: dict[str, Breakage] = {
    "another name": at("prefill", "inputs", 0, "name")("tokens"),
    "another dtype": at("decode", "inputs", 2, "dtype")("float16"),
    "another size": at("decode", "inputs", 2, "shape", 1)(7),
    "another rank": at("prefill", "outputs", 0, "shape")([1]),
    "an output less": without("prefill", "outputs", 1),
}


@pytest.mark.parametrize("how", SPECS)
def test_a_manifest_of_other_engines(how: str, folder: Path) -> None:
    SPECS[how](folder)
    with pytest.raises(ConfigError, match="is not the engine that manifest.json beside it describes") as caught:
        OnnxGenerator(folder)
    one_line(caught.value)


def test_a_file_in_the_place_of_the_folder(folder: Path) -> None:
    for name in ("manifest.json", "prefill.onnx"):
        with pytest.raises(ConfigError, match=f"{name} is a file; give the folder that export_onnx or export_tensorrt wrote"):
            OnnxGenerator(folder / name)


def test_what_is_written_is_read(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    OnnxGenerator(folder).generate(**SAMPLE)
