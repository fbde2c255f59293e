"""Exported programs: what they take and give, the merge of features, and what cannot be exported."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.family import make_inputs as family_inputs
from tests.families.family import make_model as family_model
from tests.families.table import FAMILIES
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError, UnsupportedGraphError
from tgvkv_compile.export import BudgetPlan, Programs, export_onnx, export_program
from tgvkv_compile.export.trace.lengths import question_lengths
from tgvkv_compile.export.trace.rewritten import STEPS
from tgvkv_compile.ops.static.merging import add_features, merge_features
from tgvkv_compile.ops.static.prefill import block_count

SHAPE = Shape(layers=2)
SAMPLE = make_inputs([(5, 9)])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the graphs of `programs` are dumped."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def programs(graphs: Path) -> Programs:
    return export_program(make_model(SHAPE), SAMPLE, 0.3, 6, max_prompt=64, dump_graphs=str(graphs))


def test_they_unpack_into_prefill_and_decode(programs: Programs) -> None:
    prefill, decode = programs
    assert isinstance(prefill, torch.export.ExportedProgram) and isinstance(decode, torch.export.ExportedProgram)
    assert programs.plan.max_prompt == 64 and programs.plan.max_new_tokens == 6
    first = prefill.module()(*programs.prefill_inputs)
    assert [tuple(value.shape) for value in first] == [spec.shape for spec in programs.manifest.prefill.outputs]
    state = dict(zip((spec.name.removeprefix("next_") for spec in programs.manifest.prefill.outputs), first, strict=True))
    token = state.pop("logits").argmax(1, keepdim=True)
    step = decode.module()(token, state["lengths"][:, None], *state.values())
    assert [spec.name for spec in programs.manifest.decode.inputs] == ["token", "position", *state]
    assert [tuple(value.shape) for value in step] == [spec.shape for spec in programs.manifest.decode.outputs]
    assert int(step[-1]) == int(state["lengths"]) + 1


def test_graphs_are_dumped_after_each_pass(programs: Programs, graphs: Path) -> None:
    passes = {kind: ["traced", *(step.name for step in steps)] for kind, steps in STEPS.items()}
    expected = [(kind, name) for kind in ("prefill", "decode") for name in passes[kind]]
    assert sorted(file.stem for file in graphs.iterdir()) == [
        f"{i:03d}-{kind}-{name}" for i, (kind, name) in enumerate(expected)
    ]


def test_prompts_of_other_lengths(programs: Programs) -> None:
    prefill, _ = programs
    shorter, longer = make_inputs([(2, 3)]), make_inputs([(20, 28)])
    for inputs in (shorter, longer):
        logits, *state = prefill.module()(*(inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")))
        assert int(state[-1]) == inputs["input_ids"].shape[1]
        assert torch.isfinite(logits).all()


def test_no_length_depends_on_data(programs: Programs) -> None:
    for program in programs:
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        names = {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}
        assert len(names) > 20
        assert not {name for name in names if any(bad in name for bad in ("nonzero", "masked_sc", "sort", "topk", "item"))}


def test_attention_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(program: torch.export.ExportedProgram) -> list[str]:
        found = []
        for node in program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.ndim >= 2 and list(value.shape[-2:]) == [length, length]:
                found.append(node.name)
        return found

    length = 60
    assert whole(export_program(make_model(SHAPE), SAMPLE, 0.3, 6, max_prompt=length, fixed_prompt=True).prefill)
    monkeypatch.setattr("tgvkv_compile.export.program.block_count", lambda *_: 3)
    options = {"max_prompt": length, "max_question": 20, "fixed_prompt": True}
    assert not whole(export_program(make_model(SHAPE), SAMPLE, 0.3, 6, **options).prefill)
    monkeypatch.undo()
    assert [block_count(1, 32, tokens) for tokens in (1024, 4096, 8192, 16_384, 32_768)] == [1, 2, 8, 16, 16]


def test_a_fixed_length() -> None:
    programs = export_program(make_model(SHAPE), SAMPLE, 0.3, 6, max_prompt=64, fixed_prompt=True)
    assert programs.manifest.prompt_lengths.fixed
    assert [spec.shape for spec in programs.manifest.prefill.inputs] == [(1, 64), (1, 64), (1, 3, 16, 16)]
    free = export_program(make_model(SHAPE), SAMPLE, 0.3, 6, max_prompt=64)
    ours, others = (found.prefill.module()(*found.prefill_inputs) for found in (programs, free))
    assert [tuple(a.shape) for a in ours] == [tuple(b.shape) for b in others]
    torch.testing.assert_close(ours[0], others[0], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True) if a.dtype == torch.int64)


@pytest.mark.parametrize("wide", [False, True])
def test_merging_is_masked_scatter(wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        embeds = torch.randn(3, 11, 4, generator=generator)
        mask = torch.rand(3, 11, 1, generator=generator) < seed / 20
        features = torch.randn(max(1, int(mask.sum())), 4, generator=generator)
        given = mask.expand_as(embeds) if wide else mask
        assert torch.equal(merge_features(embeds, given, features), embeds.masked_scatter(mask, features))
        added = embeds.clone()
        added[mask[:, :, 0]] += features[: int(mask.sum())]
        assert torch.equal(add_features(embeds, mask[:, :, 0], features), added)


def _plan(layers: int) -> BudgetPlan:
    return BudgetPlan((40,) * layers, 64, 6, EvictionConfig(0.3))


def test_how_long_a_question_may_be() -> None:
    model = make_model(Shape(layers=1))
    options: dict[str, Any] = {"budget": 0.3, "max_new_tokens": 2}
    long = make_inputs([(3, 150)])
    assert export_program(model, SAMPLE, max_prompt=400, **options).manifest.max_question == 256
    assert export_program(model, [SAMPLE, long], max_prompt=400, **options).manifest.max_question == 300
    assert export_program(model, SAMPLE, **options).manifest.max_question == SAMPLE["input_ids"].shape[1]
    assert question_lengths(make_inputs([(5, 9), (4,), (3, 0)])["input_ids"], torch.ones(3, 30), [IMAGE]).tolist() == [9, 0, 0]


def test_options_that_cannot_be() -> None:
    model = make_model(SHAPE)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"plan": _plan(3)}, "2 layers that evict, the budget plan has capacities for 3"),
        ({"plan": _plan(2), "max_prompt": 64}, "give one of them"),
        ({"plan": dataclasses.replace(_plan(2), max_prompt=20)}, "30 tokens, the plan is for 20"),
        ({"max_question": 0}, "max_question=0"),
        ({"budget": 2.0}, "budget=2.0"),
    ]
    for options, message in cases:
        with pytest.raises((ConfigError, UnsupportedGraphError), match=message):
            export_program(model, SAMPLE, **{"max_new_tokens": 6, **options})


def test_samples_that_lack_something() -> None:
    model = make_model(SHAPE)
    for name in ("input_ids", "pixel_values"):
        lacking = {key: value for key, value in SAMPLE.items() if key != name}
        with pytest.raises(ConfigError, match=name):
            export_program(model, lacking, plan=_plan(2))


def test_a_model_in_training_mode() -> None:
    with pytest.raises(ConfigError, match="eval"):
        export_program(make_model(SHAPE).train(), SAMPLE)


def test_a_family_that_cannot_be_exported() -> None:
    family = FAMILIES["paligemma"]
    model = family_model(family)
    with pytest.raises(UnsupportedGraphError, match=r"'paligemma' cannot be exported; llava, .*qwen3_vl can"):
        export_program(model, family_inputs(family, model, (("image", 9),)))


def test_attention_that_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    # A sliding window, as Qwen2's decoder may have one: this export would silently look further back.
    family = FAMILIES["llava_onevision"]
    model = family_model(family)
    inputs = family_inputs(family, model, ((6, "image", 9),))
    text = model.config.get_text_config()
    monkeypatch.setattr(text, "sliding_window", 8)
    monkeypatch.setattr(text, "layer_types", ["sliding_attention"] * text.num_hidden_layers)
    for layer in model.model.language_model.layers:
        monkeypatch.setattr(layer, "attention_type", "sliding_attention", raising=False)
    plan = BudgetPlan((60,) * text.num_hidden_layers, 100, 6, EvictionConfig(0.3))
    with pytest.raises(UnsupportedGraphError):
        export_program(model, inputs, plan=plan)


def test_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(SHAPE)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        export_onnx(model, SAMPLE, file)
    assert file.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'tgvkv-compile\[onnx\]'"):
        export_onnx(model, SAMPLE, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any, engine: Any, path: Path) -> None:
        path.write_text("half")
        raise UnsupportedGraphError("no counterpart")

    monkeypatch.setattr("tgvkv_compile.export.onnx.files.write_onnx", fail)
    earlier = tmp_path / "prefill.onnx"
    earlier.write_text("whole")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UnsupportedGraphError, match="no counterpart"):
            export_onnx(make_model(SHAPE), SAMPLE, folder, plan=_plan(2))
    assert [path.name for path in tmp_path.iterdir()] == ["prefill.onnx"] and earlier.read_text() == "whole"
