"""Every operator of both graphs, of every family and option, is one that Torch-TensorRT converts."""

from typing import Any

import pytest

from tests.families.family import make_inputs as family_inputs
from tests.families.family import make_model as family_model
from tests.families.table import FAMILIES
from tests.support.models import Shape, make_inputs, make_model
from tests.tensorrt.checking import problems_of_program
from tgvkv_compile.export import Programs, export_program

OPTIONS: list[dict[str, Any]] = [
    {"budget": 0.3},
    {"budget": 9, "budgeting": "waterfill", "decode": "fixed"},
    {"budget": 0.3, "budgeting": "uniform", "budget_of": "vision", "decode": "keep", "sink_tokens": 0},
]


def check(programs: Programs) -> None:
    for program in (programs.prefill, programs.decode, programs.vision):
        if program is not None:
            assert problems_of_program(program) == []


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.get("budgeting", "tvb"))
def test_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgvkv_compile.export.program.block_count", lambda *_: 2)
    inputs = make_inputs([(5, 9), (3, 0)])
    check(export_program(make_model(Shape(layers=2)), inputs, max_new_tokens=6, fixed_prompt=True, **options))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_families(name: str) -> None:
    family = FAMILIES[name]
    model = family_model(family)
    inputs = family_inputs(family, model, ((6, "image", 9), (4, "image", 5)))
    programs = export_program(model, inputs, 0.4, 6, fixed_prompt=True)
    assert (programs.vision is not None) == name.startswith("qwen")
    check(programs)


def test_a_dynamic_length_is_what_torch_tensorrt_does_not_take() -> None:
    programs = export_program(make_model(Shape(layers=1)), make_inputs([(5, 9)]), 0.3, 6, max_prompt=64)
    problems = problems_of_program(programs.prefill)
    assert problems and all("takes no dynamic shapes" in problem for problem in problems)
