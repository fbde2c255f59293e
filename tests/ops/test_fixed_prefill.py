"""A prefill of fixed shapes: attention, scores, budgets and the suffix of the functions that the compiled path is made of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.fixed_prefill import attend_and_score, first_protected, fit_layers, roles_from_mask
from tgvkv_compile.ops.fixed_shapes import retain_by_threshold, retain_layers
from tgvkv_compile.ops.packing import allocate_layers, protected_from
from tgvkv_compile.ops.policy.rank import scores_from_attention
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.probabilities import attention_probabilities
from tgvkv_compile.ops.roles import Roles


def _prompt(seed: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Roles]:
    """Query, key, value of grouped heads; the first sample padded on the left, the second without vision at times."""
    generator = torch.Generator().manual_seed(seed)
    length = blocks * int(torch.randint(4, 9, (1,), generator=generator))
    query = torch.randn(2, 4, length, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, length, 8, generator=generator)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, : int(torch.randint(0, length // 2, (1,), generator=generator))] = 0
    vision = torch.rand(2, length, 1, generator=generator) < 0.5
    vision[1] &= seed % 3 > 0
    return query, key, value, roles_from_mask((vision,), mask)


@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_whole(seed: int, blocks: int, tight: bool) -> None:
    query, key, value, roles = _prompt(seed, blocks)
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & roles.valid[:, None, :] & roles.valid[:, :, None]
    probabilities = attention_probabilities(query, key, causal[:, None], 0.4)
    mass, score = scores_from_attention(probabilities.mean(1), causal, roles)
    output = probabilities @ value.repeat_interleave(2, dim=1)
    has_vision = roles.vision.any(1)
    longest = int(torch.where(has_vision, roles.question.sum(1), 0).max())
    found = attend_and_score(query, key, value, roles, 0.4, blocks, max(1, longest) if tight else length)
    rows = roles.valid[:, None, :, None]  # a row of padding is anything finite
    torch.testing.assert_close(found.output * rows, output * rows, atol=1e-5, rtol=1e-5)
    assert bool(found.output.isfinite().all())
    torch.testing.assert_close(found.mass, mass, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score, score, atol=1e-5, rtol=1e-4)


def test_a_model_of_half_precision_is_scored_in_float32() -> None:
    query, key, value, roles = _prompt(1, 2)
    whole = attend_and_score(query.half().float(), key.half().float(), value.half().float(), roles, 0.4, 2, 20)
    half = attend_and_score(query.half(), key.half(), value.half(), roles, 0.4, 2, 20)
    assert half.output.dtype == torch.float16 and half.score.dtype == torch.float32
    assert torch.equal(half.score, whole.score)


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_suffix_begins_where_it_does(seed: int) -> None:
    *_, roles = _prompt(seed, 2)
    generator = torch.Generator().manual_seed(seed)
    last = roles.positions == roles.lengths[:, None] - 1
    keeps = tuple(roles.valid & (last | (torch.rand(roles.valid.shape, generator=generator) < 0.5)) for _ in range(3))
    assert torch.equal(first_protected(keeps, roles), protected_from(keeps, (roles,) * 3))


@pytest.mark.parametrize("budgeting", ["tvb", "waterfill", "uniform"])
def test_budgets_that_fit_are_what_they_were(budgeting: str) -> None:
    *_, roles = _prompt(4, 3)
    mass = tuple(torch.rand(2, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    options = {"budget": 0.5, "budget_of": "all", "budgeting": budgeting, "decode": "ratio", "sink_tokens": 2}
    wanted = allocate_layers(mass, roles, **options)
    found = fit_layers(mass, roles, (200,) * 3, 5, **options)
    assert torch.equal(found.kept, wanted.kept) and torch.equal(found.rate, wanted.rate)
    clipped = fit_layers(mass, roles, (8,) * 3, 0, **options)
    assert int(clipped.kept.max()) <= 8 and EvictionConfig(**options).sink_tokens < int(clipped.kept.min())  # type: ignore[arg-type]


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_all_layers_at_once_are_each_alone(seed: int) -> None:
    *_, roles = _prompt(seed, 3)
    generator = torch.Generator().manual_seed(seed)
    scores = tuple(torch.rand(roles.valid.shape, generator=generator).round(decimals=1) for _ in range(3))
    kept = torch.stack([torch.randint(5, int(length) + 1, (3,), generator=generator) for length in roles.lengths.clamp(min=5)])
    kept = kept.minimum(roles.lengths[:, None])
    together = retain_layers(scores, (text_first(roles),) * len(scores), roles, kept, sink_tokens=4)
    for layer, keep in enumerate(together):
        assert torch.equal(keep, retain_by_threshold(scores[layer], text_first(roles), roles, kept[:, layer], sink_tokens=4))
