import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import indices, vision_at, vision_masks
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.capping import cap_layer, cap_tokens
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import classify_tokens


@pytest.mark.parametrize(
    ("length", "cap", "budget", "wanted"),
    [(1000, 2.0, 0.05, 100), (1000, 3, 40, 120), (1000, 30.0, 0.05, 1000), (20, 1.0, 0.05, 5), (3, 1.0, 0.05, 3)],
)
def test_how_many(length: int, cap: float, budget: float | int, wanted: int) -> None:
    count = cap_tokens(length, cap, config=EvictionConfig(budget))
    assert wanted <= count <= min(length, wanted + 2)


@given(vision_masks(), st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_kept_of_the_candidates_is_what_is_kept_of_all(vision: Tensor, data: st.DataObject) -> None:
    length, left = len(vision), data.draw(st.integers(0, 4))
    sinks = data.draw(st.sampled_from([0, 1, 4]))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 200.0])
    score = torch.tensor([[1e9] * left + data.draw(st.lists(values, min_size=length, max_size=length))])
    valid = vision_at(left + length, (left, length))[None]
    token_types = classify_tokens(torch.cat([torch.zeros(left, dtype=torch.bool), vision])[None], valid)
    cap, budget = data.draw(st.floats(1.0, 4.0)), data.draw(st.floats(0.05, 1.0))
    key = torch.randn(1, 2, left + length, 3)
    capped = cap_layer(key, -key, score, text_first(token_types), token_types, cap, budget, sinks)
    count = capped.score.shape[1]
    assert count == cap_tokens(left + length, cap, config=EvictionConfig(budget, sink_tokens=sinks))
    there = min(count, length)
    kept = torch.tensor([data.draw(st.integers(min(length, sinks + 1), length))])
    chosen = select_tokens(capped.score, capped.tier, capped.token_types, kept, sink_tokens=sinks)[0]
    wanted = indices(select_tokens(score, text_first(token_types), token_types, kept.clamp(max=there), sink_tokens=sinks)[0])
    # The same tokens, in position order, with their own keys, values and token_types.
    columns = [int(position) + left for position in capped.token_types.positions[0, chosen]]
    assert columns == wanted
    assert torch.equal(capped.key[:, :, chosen], key[:, :, wanted]) and torch.equal(
        capped.value[:, :, chosen], -key[:, :, wanted]
    )
    assert torch.equal(capped.token_types.question[:, chosen], token_types.question[:, wanted])
    assert torch.equal(capped.token_types.vision[:, chosen], token_types.vision[:, wanted])


def test_a_sample_shorter_than_the_cap_is_padded() -> None:
    valid = vision_at(12, (7, 5))[None]
    token_types = classify_tokens(vision_at(12, (8, 2))[None], valid)
    key = torch.randn(1, 1, 12, 2)
    capped = cap_layer(key, key, torch.rand(1, 12), text_first(token_types), token_types, 2.0, 0.4, 4)
    assert capped.score.shape[1] == math.floor(12 * 0.8) + 1
    assert capped.token_types.positions[0].tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1, -1]
    assert capped.token_types.valid[0].tolist() == [True] * 5 + [False] * 5
