"""A prefill of static shapes: attention, scores, budgets and the suffix of the functions that the compiled path is made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.cache.packing import allocate_layers, protected_from
from tgvkv_compile.ops.policy.rank import scores_from_attention
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.static.prefill import attend_and_score, fit_layers, static_protected_from, token_types_from_mask
from tgvkv_compile.ops.static.selection import select_by_threshold, select_in_layers
from tgvkv_compile.ops.token_types import TokenTypes


def _prompt(seed: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, TokenTypes]:
    """Query, key, value of grouped heads; the first sample padded on the left, the second without vision at times."""
    generator = torch.Generator().manual_seed(seed)
    length = blocks * int(torch.randint(4, 9, (1,), generator=generator))
    query = torch.randn(2, 4, length, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, length, 8, generator=generator)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, : int(torch.randint(0, length // 2, (1,), generator=generator))] = 0
    vision = torch.rand(2, length, 1, generator=generator) < 0.5
    vision[1] &= seed % 3 > 0
    return query, key, value, token_types_from_mask((vision,), mask)


@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_whole(seed: int, blocks: int, tight: bool) -> None:
    query, key, value, token_types = _prompt(seed, blocks)
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & token_types.valid[:, None, :] & token_types.valid[:, :, None]
    probabilities = attention_probabilities(query, key, causal[:, None], 0.4)
    mass, score = scores_from_attention(probabilities.mean(1), causal, token_types)
    output = probabilities @ value.repeat_interleave(2, dim=1)
    has_vision = token_types.vision.any(1)
    longest = int(torch.where(has_vision, token_types.question.sum(1), 0).max())
    found = attend_and_score(query, key, value, token_types, 0.4, blocks, max(1, longest) if tight else length)
    rows = token_types.valid[:, None, :, None]  # a row of padding is anything finite
    torch.testing.assert_close(found.output * rows, output * rows, atol=1e-5, rtol=1e-5)
    assert bool(found.output.isfinite().all())
    torch.testing.assert_close(found.mass, mass, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score, score, atol=1e-5, rtol=1e-4)


def test_a_model_of_half_precision_is_scored_in_float32() -> None:
    query, key, value, token_types = _prompt(1, 2)
    whole = attend_and_score(query.half().float(), key.half().float(), value.half().float(), token_types, 0.4, 2, 20)
    half = attend_and_score(query.half(), key.half(), value.half(), token_types, 0.4, 2, 20)
    assert half.output.dtype == torch.float16 and half.score.dtype == torch.float32
    assert torch.equal(half.score, whole.score)


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_suffix_begins_where_it_does(seed: int) -> None:
    *_, token_types = _prompt(seed, 2)
    generator = torch.Generator().manual_seed(seed)
    last = token_types.positions == token_types.lengths[:, None] - 1
    keeps = tuple(
        token_types.valid & (last | (torch.rand(token_types.valid.shape, generator=generator) < 0.5)) for _ in range(3)
    )
    assert torch.equal(static_protected_from(keeps, token_types), protected_from(keeps, (token_types,) * 3))


@pytest.mark.parametrize("budgeting", ["tvb", "waterfill", "uniform"])
def test_budgets_that_fit_are_what_they_were(budgeting: str) -> None:
    *_, token_types = _prompt(4, 3)
    mass = tuple(torch.rand(2, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    options = {"budget": 0.5, "budget_of": "all", "budgeting": budgeting, "decode": "ratio", "sink_tokens": 2}
    wanted = allocate_layers(mass, token_types, **options)
    found = fit_layers(mass, token_types, (200,) * 3, 5, **options)
    assert torch.equal(found.kept, wanted.kept) and torch.equal(found.rate, wanted.rate)
    clipped = fit_layers(mass, token_types, (8,) * 3, 0, **options)
    assert int(clipped.kept.max()) <= 8 and EvictionConfig(**options).sink_tokens < int(clipped.kept.min())  # type: ignore[arg-type]


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_all_layers_at_once_are_each_alone(seed: int) -> None:
    *_, token_types = _prompt(seed, 3)
    generator = torch.Generator().manual_seed(seed)
    scores = tuple(torch.rand(token_types.valid.shape, generator=generator).round(decimals=1) for _ in range(3))
    kept = torch.stack(
        [torch.randint(5, int(length) + 1, (3,), generator=generator) for length in token_types.lengths.clamp(min=5)]
    )
    kept = kept.minimum(token_types.lengths[:, None])
    together = select_in_layers(scores, (text_first(token_types),) * len(scores), token_types, kept, sink_tokens=4)
    for layer, keep in enumerate(together):
        assert torch.equal(
            keep, select_by_threshold(scores[layer], text_first(token_types), token_types, kept[:, layer], sink_tokens=4)
        )
