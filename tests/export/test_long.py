"""Contexts beyond the longest sort of TensorRT: 16k tokens on ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from tests.export.engines import check_files, compiled_answer
from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile.export import OnnxGenerator, export_onnx

TOKENS = 16_384
SIDE = 32


@pytest.mark.slow
def test_sixteen_thousand_tokens(tmp_path: Path) -> None:
    model = make_model(Shape(layers=1, heads=2, kv_heads=1, side=SIDE))
    model.config.text_config.max_position_embeddings = 2 * TOKENS
    pictures = TOKENS // SIDE**2 - 1
    inputs = make_inputs([(20, *[0] * (pictures - 1), TOKENS - 20 - pictures * SIDE**2)], side=SIDE)
    assert inputs["input_ids"].shape == (1, TOKENS)
    manifest = export_onnx(model, inputs, tmp_path, 0.05, 4)
    assert manifest.max_prompt == TOKENS and manifest.prompt_lengths.multiple > 1
    assert max(manifest.plan.capacities) < 0.1 * TOKENS
    generator = OnnxGenerator(tmp_path)
    check_files(generator)
    found = generator.generate(**inputs, max_new_tokens=4)
    assert torch.equal(found, compiled_answer(model, inputs, 0.05, 4))
