"""What cannot be exported is refused before anything is traced, or before it is exported as something else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError, UnsupportedGraphError
from tgvkv_compile.export import BudgetPlan, export_onnx, export_program

SAMPLE = make_inputs([(5, 9)])
PLAN = BudgetPlan((40, 40), 64, 6, EvictionConfig(0.3))


def model(attention: str = "sdpa") -> Any:
    return make_model(Shape(layers=2, attention=attention))


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is looked at is too late."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated or traced")

    for name in ("calibrate", "traced_prefill"):
        monkeypatch.setattr(f"tgvkv_compile.export.program.{name}", fail)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_engines_lack(dtype: torch.dtype, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    whole, one = model().to(dtype), model()
    one.lm_head.to(dtype)
    for given in (whole, one):
        with pytest.raises(ConfigError, match=rf"weights in {name} cannot be exported: .*dtype='float32' or 'float16'"):
            export_onnx(given, SAMPLE, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("attention", ["flex_attention"])
def test_attention_that_cannot_be_traced(attention: str) -> None:
    with pytest.raises(ConfigError, match=rf"attn_implementation='{attention}' of .* cannot be exported.*'sdpa'"):
        export_program(model(attention), SAMPLE)


@pytest.fixture
def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder hands no mask to its attention; whether that is causal is up to the layer."""
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)


@pytest.mark.usefixtures("no_mask")
def test_causal_attention_without_a_mask_is_exported_as_such() -> None:
    given = model()
    prefill, _ = export_program(given, SAMPLE, plan=PLAN)
    inputs = [SAMPLE[name] for name in ("input_ids", "attention_mask", "pixel_values")]
    logits: Tensor = prefill.module()(*inputs)[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, given(**SAMPLE).logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_mask")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_attention_without_a_mask_that_is_not_causal_is_refused(layers: tuple[int, ...], attention: str) -> None:
    """It would be exported as causal attention."""
    given = model(attention)
    for layer in layers:
        given.model.language_model.layers[layer].self_attn.is_causal = False
    with pytest.raises(UnsupportedGraphError, match="is missing, so that every token sees all others.*causal attention alone"):
        export_program(given, SAMPLE, plan=PLAN)


def test_a_decode_step_that_does_not_see_all_of_its_past(monkeypatch: pytest.MonkeyPatch) -> None:
    create = modeling_llama.create_causal_mask

    def windowed(*given: Any, **named: Any) -> Any:
        embeds = named["inputs_embeds"]
        if embeds.shape[1] != 1:
            return create(*given, **named)
        return torch.arange(9).ge(4).expand(embeds.shape[0], 1, 1, 9)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    with pytest.raises(UnsupportedGraphError, match="of a decode step hides some of the past"):
        export_program(model(), SAMPLE, plan=PLAN)


def test_what_torch_says_of_a_model_that_it_cannot_trace_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\nand a graph of a thousand lines")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UnsupportedGraphError) as caught:
        export_program(model(), SAMPLE, plan=PLAN)
    assert str(caught.value) == "torch.export cannot trace this model: no"
