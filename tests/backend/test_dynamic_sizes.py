"""Which dimensions of a decoder's arguments are dynamic."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tgvkv_compile.backend.dynamic_sizes import mark_decoder_inputs

LAYERS = 4


def marked(batch: int, tokens: int) -> dict[str, set[int]]:
    given: dict[str, Any] = {
        "inputs_embeds": torch.zeros(batch, tokens, LAYERS),
        "per_layer_inputs": torch.zeros(batch, tokens, LAYERS, 5),
        "attention_mask": {"full": torch.zeros(batch, 1, tokens, tokens + 2), "windows": torch.ones(batch, tokens).long()},
        "position_ids": torch.zeros(3, batch, tokens).long(),
        "features": [torch.zeros(11, LAYERS)],
    }
    vision, kwargs = mark_decoder_inputs(torch.ones(batch, tokens, 1, dtype=torch.bool), given)
    flat: dict[str, Tensor | None] = {**kwargs, **kwargs["attention_mask"], "features": kwargs["features"][0], "vision": vision}
    return {
        name: set(getattr(value, "_dynamo_weak_dynamic_indices", ()))
        for name, value in flat.items()
        if isinstance(value, Tensor)
    }


@pytest.mark.parametrize("tokens", [LAYERS, 9, 16])
@pytest.mark.parametrize("batch", [2, LAYERS, 9])
def test_what_is_as_large_by_chance_stays_constant(batch: int, tokens: int) -> None:
    assert marked(batch, tokens) == {
        "inputs_embeds": {0, 1},
        "per_layer_inputs": {0, 1},
        "full": {0, 2, 3},
        "windows": {0, 1},
        "position_ids": {1, 2},
        "features": {0},
        "vision": {0, 1},
    }
