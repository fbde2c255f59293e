"""A later turn with new vision: the functions of the graph against the oracle, and the oracle against the rule in words."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import causal, configs, indices, prefill_scores, random_attention, vision_at, vision_masks
from tests.support.oracle import Oracle
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops import weighing
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.attention.sdpa import scaled_dot_product_attention_with_lse
from tgvkv_compile.ops.cache.later_turns import (
    allocate_again,
    candidate_mask,
    candidate_token_types,
    extend_history,
    turn_token_types,
    vision_history,
)
from tgvkv_compile.ops.cache.packing import protected_from
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.rank import scores_from_attention
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens

LAYERS = 3


def paid(rows: int, columns: int, seed: int) -> Tensor:
    """`[rows, columns]` float32 probabilities; the rows are the last of the columns, and causal."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, columns, generator=generator)
    return logits.masked_fill(~causal(columns)[columns - rows :], float("-inf")).softmax(-1)


def prefilled(vision: Tensor, config: EvictionConfig, *, steps: int = 0, seed: int = 0) -> Oracle:
    oracle = Oracle(config)
    oracle.prefill(random_attention(LAYERS, len(vision), seed=seed), vision)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for layer in range(LAYERS):
            oracle.decode(layer, torch.rand(len(oracle.attended(layer)), generator=generator))
    return oracle


@given(st.data(), configs(), st.integers(0, 12))
@settings(max_examples=25)
def test_the_functions_on_a_batch_are_the_oracle(data: st.DataObject, config: EvictionConfig, steps: int) -> None:
    """With different survivors, with padding, and with samples that have no new vision (or never had any)."""
    batch = data.draw(st.integers(1, 3))
    oracles = [prefilled(data.draw(vision_masks(max_length=24)), config, steps=steps, seed=i) for i in range(batch)]
    news = [data.draw(vision_masks(max_length=16)) for _ in range(batch)]
    survivors = [[list(kept) for kept in oracle.kept] for oracle in oracles]
    before = [oracle._totals[0] for oracle in oracles]
    rates = torch.stack([oracle.rate for oracle in oracles])
    history = torch.zeros(batch, max(before), dtype=torch.bool)
    for sample, oracle in enumerate(oracles):
        history[sample, : len(oracle._vision)] = torch.tensor(oracle._vision)

    count = max(map(len, news))
    vision, mask = torch.zeros(batch, count, dtype=torch.bool), torch.zeros(batch, 1, count, max(before) + count).bool()
    for sample, new in enumerate(news):
        vision[sample, -len(new) :] = new
        vision[sample, : -len(new)] = True  # padding that is marked as vision is padding all the same
        mask[sample, 0, :, -len(new) :] = causal(count)[:, -len(new) :]
    token_types = turn_token_types(vision, mask, torch.tensor(before))
    masses, scores, candidates = [], [], []
    for layer in range(LAYERS):
        width = max(len(kept[layer]) for kept in survivors) + 1
        positions = torch.full((batch, width), -1)
        attention = torch.rand(batch, count, width + count)  # what padding pays and is paid is garbage
        for sample, (new, kept) in enumerate(zip(news, survivors, strict=True)):
            there = len(kept[layer])
            positions[sample, :there] = torch.tensor(kept[layer])
            own = paid(len(new), there + len(new), seed=7 * sample + layer)
            attention[sample, -len(new) :, :there] = own[:, :there]
            attention[sample, -len(new) :, -len(new) :] = own[:, there:]
        candidates.append(candidate_token_types(history, positions, token_types))
        seen = candidate_mask(mask, positions, vision)[:, 0]
        mass, score = scores_from_attention(attention, seen, candidates[-1])
        masses.append(mass)
        scores.append(score)
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    allocation = allocate_again(tuple(masses), tuple(candidates), history, token_types, rates, **options)
    keeps = [
        select_tokens(score, text_first(token_types), token_types, allocation.kept[:, layer], sink_tokens=config.sink_tokens)
        for layer, (score, token_types) in enumerate(zip(scores, candidates, strict=True))
    ]
    protected = protected_from(tuple(keeps), tuple(candidates))
    after = extend_history(history, token_types)
    for sample, (oracle, new) in enumerate(zip(oracles, news, strict=True)):
        attention = [paid(len(new), len(kept) + len(new), seed=7 * sample + i) for i, kept in enumerate(survivors[sample])]
        oracle.extend_with_vision(attention, new)
        assert int(token_types.lengths[sample]) == before[sample] + len(new) == oracle._totals[0]
        assert indices(after[sample]) == [position for position, seen in enumerate(oracle._vision) if seen]
        for layer, keep in enumerate(keeps):
            assert candidates[layer].positions[sample][keep[sample]].tolist() == oracle.kept[layer]
            assert int(allocation.kept[sample, layer]) == len(oracle.kept[layer])
            assert int(protected[sample, layer]) == oracle._protected[layer][0]
        torch.testing.assert_close(allocation.rate[sample], oracle.rate)


def test_the_rule_in_words() -> None:
    config = EvictionConfig(0.25, budgeting="uniform")
    oracle = prefilled(vision_at(24, (6, 12)), config, steps=4)
    assert all(len(kept) == 7 for kept in oracle.kept)  # 28 * 0.25
    text = [[position for position in kept if not 6 <= position < 18] for kept in oracle.kept]
    new = vision_at(16, (3, 8))
    oracle.extend_with_vision([paid(16, len(kept) + 16, seed=3) for kept in oracle.kept], new)
    for layer, kept in enumerate(oracle.kept):
        assert len(kept) == 11  # 44 * 0.25: of the true length, not of the 23 candidates
        assert {0, 1, 2, 3, 43} <= set(kept)
        candidates = {*text[layer], *range(28, 31), *range(39, 44)}
        assert set(kept) <= candidates, "vision is kept although text is not"
        assert oracle._protected[layer] == [position for position in kept if position >= 39]
    assert oracle.rate.tolist() == [0.25] * LAYERS


def test_text_outranks_vision_that_survived() -> None:
    """Room for all text and a little more: what remains is vision, old or new."""
    oracle = prefilled(vision_at(20, (4, 10)), EvictionConfig(0.9, budgeting="uniform"))
    old = [set(kept) & set(range(4, 14)) for kept in oracle.kept]
    oracle.extend_with_vision([paid(10, len(kept) + 10, seed=5) for kept in oracle.kept], vision_at(10, (2, 5)))
    for layer, kept in enumerate(oracle.kept):
        assert len(kept) == 27 and len(old[layer]) == 8
        assert {*range(4), *range(14, 22), *range(27, 30)} <= set(kept)
        assert len(set(kept) & {*old[layer], *range(22, 27)}) == 12


def test_no_layer_keeps_more_than_there_is() -> None:
    """The budget is of the true length; what decoding and the first budgeting took is gone."""
    oracle = prefilled(vision_at(40, (4, 30)), EvictionConfig(0.2, budgeting="uniform"))
    oracle.config = EvictionConfig(0.9, budgeting="uniform")
    oracle.extend_with_vision([paid(6, len(kept) + 6, seed=5) for kept in oracle.kept], vision_at(6, (0, 4)))
    assert all(len(kept) == 8 + 6 for kept in oracle.kept) and oracle.rate.tolist() == pytest.approx([0.9] * LAYERS)


def test_a_vision_budget_counts_vision_that_is_gone() -> None:
    """Fifteen vision tokens in all: six are kept beside the fifteen of text, although only nine are left to choose from."""
    history = vision_at(20, (4, 10))[None]
    new = turn_token_types(vision_at(10, (2, 5))[None], None, torch.tensor([20]))
    survivors = torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8, *range(14, 20)]])
    candidates = candidate_token_types(history, survivors, new)
    assert int(candidates.vision.sum()) == 9 and int(candidates.valid.sum()) == 24
    options: dict[str, Any] = {"budget": 0.4, "budget_of": "vision", "budgeting": "uniform"}
    found = allocate_again((torch.ones(1),), (candidates,), history, new, torch.ones(1, 1), **options)
    assert found.kept.tolist() == [[21]] and found.rate.tolist() == [[pytest.approx(21 / 30)]]


def test_a_turn_without_new_vision_is_a_continuation() -> None:
    one, other = (prefilled(vision_at(30, (4, 20)), EvictionConfig(0.2), steps=3) for _ in range(2))
    rate = one.rate
    one.extend_with_vision([paid(5, len(kept) + 5, seed=1) for kept in one.kept], vision_at(5))
    other.extend(5)
    assert one.kept == other.kept and one.suffix == other.suffix == [5] * LAYERS and one.rate is rate


@pytest.mark.parametrize("padded", [False, True])
def test_history_counts_no_padding(padded: bool) -> None:
    vision = torch.stack([vision_at(6, (2, 2)), vision_at(6, (3, 3))])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :3] = not padded
    found = vision_history(classify_tokens(vision, valid))
    assert indices(found[0]) == [2, 3] and indices(found[1]) == ([0, 1, 2] if padded else [3, 4, 5])
    more = extend_history(found, turn_token_types(vision, None, torch.tensor([6, 3 if padded else 6])))
    assert more.shape == (2, 12) and indices(more[1])[3:] == ([6, 7, 8] if padded else [9, 10, 11])


@pytest.mark.parametrize("known", [False, True], ids=["all-rows", "log-sum-exp"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_the_op_on_the_last_rows_only(known: bool, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "_BLOCK_BYTES", {"cpu": 1})  # the smallest blocks: 16 rows
    generator = torch.Generator().manual_seed(0)
    rows, columns = 40, 57
    q = torch.randn(2, heads, rows, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, columns, 8, generator=generator) for _ in range(2))
    positions = torch.arange(17).expand(2, -1).clone()
    positions[1, 12:] = -1
    history = vision_at(17, (2, 9)).expand(2, -1)
    mask = causal(rows).expand(2, 1, -1, -1).clone()
    mask[0, :, :, :5] = False
    vision = vision_at(rows, (8, 10)).expand(2, -1)
    token_types = candidate_token_types(history, positions, turn_token_types(vision, mask, torch.tensor([17, 12])))
    seen = candidate_mask(mask, positions, vision)
    lse = scaled_dot_product_attention_with_lse(q, k, v, seen, False, 0.4)[1] if known else None
    mass, score = prefill_scores(q, k, token_types, seen, False, 0.4, lse)
    attention = attention_probabilities(q, k, seen, 0.4).mean(1)
    expected_mass, expected_score = scores_from_attention(attention, seen[:, 0], token_types)
    assert score.shape == (2, columns) and bool((score[token_types.valid] > 0).all())
    torch.testing.assert_close(mass, expected_mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score, expected_score, rtol=1e-5, atol=1e-6)
    _check_in_words(attention, token_types, mass, score, columns - rows)


def _check_in_words(attention: Tensor, token_types: TokenTypes, mass: Tensor, score: Tensor, first: int) -> None:
    """Prefill 1, 3 and 4, for the rows that there are, by loops."""
    for sample in range(2):
        asking = indices(token_types.question[sample])
        seen = indices(token_types.vision[sample])
        a = attention[sample]
        assert float(mass[sample]) == pytest.approx(sum(float(a[i - first, v]) for i in asking for v in seen), rel=1e-4)
        weights = [sum(float(a[i - first, j]) for i in asking if i >= j) / sum(i >= j for i in asking) for j in asking]
        for v in seen[::5]:
            expected = sum(u * float(a[j - first, v]) for u, j in zip(weights, asking, strict=True))
            assert float(score[sample, v]) == pytest.approx(expected, rel=1e-4)
        rows = [i for i in indices(token_types.valid[sample]) if i >= first]
        for t in [0, asking[1]]:
            expected = sum(float(a[i - first, t]) for i in rows)
            if t not in seen:
                assert float(score[sample, t]) == pytest.approx(expected, rel=1e-4)
