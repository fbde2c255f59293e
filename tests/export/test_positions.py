"""Rotary positions of pictures of a known size: those that transformers finds."""

import pytest
import torch

from tests.families.family import make_inputs, make_model
from tests.families.table import FAMILIES
from tgvkv_compile.export.trace.families import engine_inputs, family_of
from tgvkv_compile.export.trace.positions import picture_positions


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_they_are_the_models(name: str) -> None:
    family = FAMILIES[name]
    model = make_model(family)
    for prompts in (((6, "image", 9), (4, "image", 5)), ((2, "image", 3, "image", 1), (11,)), (("image", 1), (1, "image", 4))):
        inputs = make_inputs(family, model, prompts)
        expected = engine_inputs(model, family_of(model), inputs)["position_ids"]
        merge = model.config.vision_config.spatial_merge_size
        grids = inputs["image_grid_thw"].tolist()
        found = picture_positions(inputs["input_ids"], inputs["attention_mask"], [model.config.image_token_id], grids, merge)
        valid = inputs["attention_mask"] != 0
        assert torch.equal(found[:, valid], expected[:, valid])
