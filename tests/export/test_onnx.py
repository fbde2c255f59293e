"""Exported models on ONNX Runtime: the tokens of the compiled torch path, and a cache that is no larger than planned."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from torch import Tensor

from tests.export.engines import check_files, compiled_answer, run_engine
from tests.families.family import make_inputs as family_inputs
from tests.families.family import make_model as family_model
from tests.families.table import FAMILIES
from tests.golden.recorded import case_name, cases, check_decoding, load_inputs, load_model, recorded_tokens
from tgvkv_compile.errors import CacheError, ConfigError, PaddingError
from tgvkv_compile.export import OnnxGenerator, encode, export_onnx

NEW = 40
RECORDED = {case_name(case): case for case in cases()}
QUICK = ("llava-small-0.05", "llava-small-0.5")
OTHERS = ("llava-small-0.2", "llava-small-0.9", "llava-576-0.05", "llava-576-0.2", "llava-576-0.5", "llava-576-0.9")

Exported = tuple[Any, dict[str, Tensor], OnnxGenerator]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @functools.cache
    def export(name: str) -> Exported:
        case = RECORDED[name]
        model, inputs = load_model(case["case"]), load_inputs(case["case"])
        folder = tmp_path_factory.mktemp(name)
        export_onnx(model, inputs, folder, case["budget"], NEW)
        return model, inputs, OnnxGenerator(folder)

    return export


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_tokens_of_the_compiled_path_and_of_the_record(golden: Callable[[str], Exported], name: str) -> None:
    model, inputs, generator = golden(name)
    case = RECORDED[name]
    check_files(generator)
    sequences = generator.generate(**inputs, max_new_tokens=NEW)
    assert sequences.dtype == torch.int64
    assert torch.equal(sequences, compiled_answer(model, inputs, case["budget"], NEW))

    trace = run_engine(generator, inputs, len(case["lens"]), forced=recorded_tokens(case))
    assert trace.kept[0][0] == case["kept"]
    check_decoding(case, trace.logits, trace.lengths)


def test_what_is_carried_between_steps_is_what_was_planned(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[0])
    plan, layers = generator.manifest.plan, 4
    generator.generate(**inputs, max_new_tokens=5)
    state = generator._state
    for layer, capacity in enumerate(plan.capacities):
        assert state[f"key_{layer}"].shape() == state[f"value_{layer}"].shape() == [1, 2, capacity, 16]
        assert state[f"slot_position_{layer}"].shape() == [1, capacity]
    full = 2 * layers * 2 * (plan.max_prompt + NEW) * 16 * 4
    assert generator.cache_bytes() - generator.manifest.cache_bytes() < 100  # rates, lengths
    assert generator.manifest.cache_bytes() < 0.25 * full
    decode = onnx.load(generator.folder / "decode.onnx").graph
    sizes = {out.name: [dim.dim_value for dim in out.type.tensor_type.shape.dim] for out in decode.output}
    assert sizes["next_key_1"] == [1, 2, plan.capacities[1], 16]


def test_no_step_copies_the_cache(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[0])
    generator.prefill(generator.checked(inputs))
    names = [name for name in generator._state if name.startswith(("key_", "value_", "slot_position_"))]
    before = {name: generator._state[name].data_ptr() for name in names}
    for step in range(3):
        generator.decode(torch.tensor([[7]]), torch.tensor([[82 + step]]))
    for reads, _ in generator._steps:
        outputs = dict(zip((spec.name for spec in generator.manifest.decode.outputs), reads.get_outputs(), strict=True))
        assert {name: outputs[f"next_{name}"].data_ptr() for name in names} == before


def test_weights_are_on_disk_once(golden: Callable[[str], Exported]) -> None:
    model, _, generator = golden(QUICK[1])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    files = {path.name: path.stat().st_size for path in generator.folder.iterdir()}
    assert set(files) == {"prefill.onnx", "decode.onnx", "weights.data", "manifest.json"}
    assert files["weights.data"] < 1.2 * weights  # both graphs hold nearly all of them


def test_requests_do_not_meet(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[1])
    other = {**inputs, "pixel_values": -inputs["pixel_values"], "input_ids": inputs["input_ids"][:, :-5]}
    other["attention_mask"] = torch.ones_like(other["input_ids"])
    first = generator.generate(**inputs, max_new_tokens=12)
    second = generator.generate(**other, max_new_tokens=12)
    fresh = OnnxGenerator(generator.folder)
    assert torch.equal(second, fresh.generate(**other, max_new_tokens=12))
    assert torch.equal(first, generator.generate(**inputs, max_new_tokens=12))


@pytest.mark.parametrize("new_tokens", [1, 2, 39])
def test_shorter_prompts_and_answers(golden: Callable[[str], Exported], new_tokens: int) -> None:
    model, inputs, generator = golden(QUICK[1])
    shorter = {name: value[:, :-7] if name != "pixel_values" else value for name, value in inputs.items()}
    found = generator.generate(**shorter, max_new_tokens=new_tokens)
    assert torch.equal(found, compiled_answer(model, shorter, 0.5, new_tokens))


def test_an_answer_ends_with_its_end_token(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[1])
    length = inputs["input_ids"].shape[1]
    whole = generator.generate(**inputs, max_new_tokens=12)
    end = int(whole[0, length + 4])
    place = whole[0, length:].tolist().index(end)
    ended = generator.generate(**inputs, max_new_tokens=12, eos_token_id=end)
    assert torch.equal(ended, whole[:, : length + place + 1])


def test_numpy_inputs(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[1])
    arrays: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    assert isinstance(arrays["input_ids"], numpy.ndarray)
    assert torch.equal(generator.generate(**arrays, max_new_tokens=3), generator.generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_families(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family_model(family)
    inputs = family_inputs(family, model, ((6, "image", 9), (4, "image", 5)))
    export_onnx(model, inputs, tmp_path, 0.4, 12)
    generator = OnnxGenerator(tmp_path)
    check_files(generator)
    found = generator.generate(**encode(model, inputs), max_new_tokens=12)
    assert torch.equal(found, compiled_answer(model, inputs, 0.4, 12))
    assert torch.equal(found, generator.generate(**inputs, max_new_tokens=12))
    assert (generator.manifest.vision is not None) == name.startswith("qwen")
    # Another prompt of the same pictures, shorter: positions and padding are its own.
    others = family_inputs(family, model, ((3, "image", 8), (6, "image", 4)), seed=5)
    expected = compiled_answer(model, others, 0.4, 12)
    assert torch.equal(generator.generate(**encode(model, others), max_new_tokens=12), expected)
    assert torch.equal(generator.generate(**others, max_new_tokens=12), expected)
    assert not torch.equal(found, expected)


def _changed(inputs: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**inputs, **changes}.items() if value is not None}


def _right_padded(inputs: dict[str, Tensor]) -> dict[str, Any]:
    mask = inputs["attention_mask"].clone()
    mask[:, -3:] = 0
    return _changed(inputs, attention_mask=mask)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "right padding": (_right_padded, "padding_side='left'"),
    "batch": (lambda i: _changed(i, input_ids=i["input_ids"].repeat(2, 1), attention_mask=None), "batch of 1"),
    "too long": (
        lambda i: _changed(i, input_ids=torch.cat([i["input_ids"][:, :1], i["input_ids"]], 1), attention_mask=None),
        "max_prompt=83",
    ),
    "a picture less": (
        lambda i: _changed(i, input_ids=i["input_ids"].clamp(max=149)),
        "0 vision tokens, the engines are for 64",
    ),
    "size of pictures": (lambda i: _changed(i, pixel_values=i["pixel_values"][..., :-1]), "the shape"),
    "no pictures": (lambda i: _changed(i, pixel_values=None), "pixel_values missing"),
    "no tokens": (lambda i: _changed(i, input_ids=None), "no input_ids"),
    "unknown input": (lambda i: _changed(i, image_sizes=torch.ones(1, 2)), "take no image_sizes"),
    "sampling": (lambda i: _changed(i, do_sample=True), "greedily"),
    "too many tokens": (lambda i: _changed(i, max_new_tokens=NEW + 1), "more max_new_tokens"),
    "no tokens wanted": (lambda i: _changed(i, max_new_tokens=0), "from 1 to"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_suit_is_refused(golden: Callable[[str], Exported], what: str) -> None:
    _, inputs, generator = golden(QUICK[1])
    before = generator.generate(**inputs, max_new_tokens=4)
    change, message = WRONG[what]
    with pytest.raises((ConfigError, PaddingError), match=re.escape(message)):
        generator.generate(**change(inputs))
    assert torch.equal(generator.generate(**inputs, max_new_tokens=4), before)


def test_steps_without_room_are_refused(golden: Callable[[str], Exported]) -> None:
    _, inputs, generator = golden(QUICK[1])
    fresh = OnnxGenerator(generator.folder)
    token = torch.tensor([[5]])
    with pytest.raises(CacheError, match="without a prefill"):
        fresh.decode(token, token)
    fresh.prefill(fresh.checked(inputs))
    for step in range(NEW):
        fresh.decode(token, torch.tensor([[82 + step]]))
    with pytest.raises(CacheError, match=f"{NEW} decode steps"):
        fresh.decode(token, token)


def test_folders_without_an_export(golden: Callable[[str], Exported], tmp_path: Path) -> None:
    _, _, generator = golden(QUICK[1])
    with pytest.raises(ConfigError, match="there is no"):
        OnnxGenerator(tmp_path)
    text = (generator.folder / "manifest.json").read_text()
    for broken, message in (
        ("{", "not JSON"),
        ("{}", "format"),
        (text.replace('"batch_size"', '"batch"'), "fields"),
        (text, "lacks"),
    ):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ConfigError, match=message):
            OnnxGenerator(tmp_path)


def test_providers_that_are_not_there(golden: Callable[[str], Exported]) -> None:
    _, _, generator = golden(QUICK[1])
    with pytest.raises(ConfigError, match="NoSuchProvider"):
        OnnxGenerator(generator.folder, providers=["NoSuchProvider"])
