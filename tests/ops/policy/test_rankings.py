"""Each ranking against its formula in words: one sample, loops, attention written out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.prompts import Layer, make_layer, vision_at
from tgvkv_compile.ops.attention.sdpa import scaled_dot_product_attention_with_lse
from tgvkv_compile.ops.policy.layer import Ranked
from tgvkv_compile.ops.policy.named import RANKINGS
from tgvkv_compile.ops.policy.rank import TokenRanks, rank_tokens
from tgvkv_compile.ops.policy.uniform import uniform

BUDGET = 0.25
Sample = tuple[list[float], list[int]]
"""Of the valid tokens of a sample: scores, and tiers."""


def attention_of(layer: Layer, sample: int) -> list[list[float]]:
    """Causal head-mean attention of the valid tokens, in float64."""
    valid = layer.token_types.valid[sample]
    q, k = layer.q[sample, :, valid].double(), layer.k[sample, :, valid].double()
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    rows = []
    for i in range(q.shape[1]):
        heads = [(q[head, i] @ k[head, : i + 1].T * layer.scale).softmax(-1) for head in range(q.shape[0])]
        rows.append([*(sum(heads) / len(heads)).tolist(), *[0.0] * (q.shape[1] - i - 1)])
    return rows


def snapkv_in_words(layer: Layer, sample: int) -> Sample:
    rows = attention_of(layer, sample)
    count = len(rows)
    first = max(0, count - 32)
    votes = [sum(rows[i][s] for i in range(first, count)) if s < first else 0.0 for s in range(count)]
    pooled = [sum(votes[t] for t in range(s - 2, s + 3) if 0 <= t < count) / 5 if s < first else 0.0 for s in range(count)]
    return pooled, [int(s >= first) for s in range(count)]


def h2o_in_words(layer: Layer, sample: int) -> Sample:
    rows = attention_of(layer, sample)
    count = len(rows)
    recent = math.floor(count * BUDGET / 2)
    return [sum(row[s] for row in rows) for s in range(count)], [int(s >= count - recent) for s in range(count)]


def streaming_in_words(layer: Layer, sample: int) -> Sample:
    count = int(layer.token_types.valid[sample].sum())
    return [float(s + 1) for s in range(count)], [0] * count


def knorm_in_words(layer: Layer, sample: int) -> Sample:
    k = layer.k[sample, :, layer.token_types.valid[sample]].double()
    norms = [sum(math.sqrt(sum(x * x for x in head[s].tolist())) for head in k) / len(k) for s in range(k.shape[1])]
    return [1 / (1 + norm) for norm in norms], [0] * len(norms)


def random_in_words(layer: Layer, sample: int) -> Sample:
    scores = []
    for position in range(int(layer.token_types.valid[sample].sum())):
        state = (position + 2) * 69621 + 39373
        for _ in range(4):
            state = (state % (2**31 - 1)) * 48271 % (2**31 - 1)
            state ^= state >> 15
        scores.append(float(state % 2**24))
    return scores, [0] * len(scores)


IN_WORDS: dict[str, Callable[[Layer, int], Sample]] = {
    "snapkv": snapkv_in_words,
    "h2o": h2o_in_words,
    "streaming": streaming_in_words,
    "knorm": knorm_in_words,
    "random": random_in_words,
}


def ranked(prompt: Layer, ranking: Any, *, known: bool = False, **options: Any) -> TokenRanks:
    args = (prompt.q, prompt.k, prompt.token_types, prompt.attn_mask, prompt.is_causal, prompt.scale)
    lse = None
    if known:
        _, lse = scaled_dot_product_attention_with_lse(
            prompt.q, prompt.k, prompt.k, prompt.attn_mask, prompt.is_causal, prompt.scale
        )
    return rank_tokens(*args, lse, ranking=ranking, budget=BUDGET, **options)


def test_every_name_has_its_words() -> None:
    """TGV-KV's own ranking has its words in `tests/ops/test_scoring.py`."""
    assert {*IN_WORDS, "twr"} == set(RANKINGS)


@given(
    length=st.integers(1, 60),
    padding=st.integers(0, 20),
    known=st.booleans(),
    seed=st.integers(0, 9),
    name=st.sampled_from([*IN_WORDS]),
)
@settings(max_examples=80)
def test_a_ranking_is_its_formula(length: int, padding: int, known: bool, seed: int, name: str) -> None:
    whole = length + padding
    vision = vision_at(whole, (padding + length // 4, length // 3)).expand(2, -1)
    layer = make_layer(
        batch=2,
        heads=4,
        kv_heads=2,
        length=whole,
        vision=vision,
        padding=(0, padding),
        mask="bool" if padding else "none",
        seed=seed,
    )
    ranks = ranked(layer, name, known=known)
    assert (ranks.score.dtype, ranks.tier.dtype, ranks.mass.dtype) == (torch.float32, torch.int64, torch.float32)
    assert bool((ranks.score >= 0).all()) and bool((ranks.mass == 0).all())
    for sample in range(2):
        valid = layer.token_types.valid[sample]
        score, tier = IN_WORDS[name](layer, sample)
        torch.testing.assert_close(ranks.score[sample, valid], torch.tensor(score, dtype=torch.float32), rtol=1e-5, atol=1e-6)
        assert ranks.tier[sample, valid].tolist() == tier
        assert bool((ranks.score[sample, ~valid] == 0).all())


@pytest.mark.parametrize("name", [*RANKINGS])
def test_all_text_stays_where_the_budget_is_of_vision(name: str) -> None:
    layer = make_layer(length=50)
    tier = ranked(layer, name, budget_of="vision").tier
    assert bool((tier[layer.token_types.valid & ~layer.token_types.vision] == 2).all())
    assert int(tier[layer.token_types.vision].max()) < 2


def test_random_differs_between_layers_and_seeds_and_nothing_else() -> None:
    one, other = make_layer(length=40), make_layer(length=40, seed=3, dtype=torch.bfloat16)
    assert torch.equal(ranked(one, "random").score, ranked(other, "random").score)
    assert torch.equal(ranked(one, uniform(seed=0)).score, ranked(one, "random").score)
    assert not torch.equal(ranked(one, "random", layer=1).score, ranked(one, "random").score)
    assert not torch.equal(ranked(one, uniform(seed=1)).score, ranked(one, "random").score)


def test_random_is_uniform() -> None:
    """Which quarter of 400 positions stays, over 300 layers: each about 75 times."""
    layer = make_layer(length=400)
    counts = torch.zeros(400)
    for number in range(300):
        counts[ranked(layer, "random", layer=number).score[0].topk(100).indices] += 1
    assert float(counts.min()) > 40 and float(counts.max()) < 115


def test_a_function_ranks_as_its_author_says() -> None:
    layer = make_layer(length=30)
    seen: list[Any] = []

    def newest_first(one: Any) -> Any:
        seen.append(one)
        return Ranked(one.tokens.positions.float().clamp(min=0), layer_weight=one.share)

    ranks = ranked(layer, newest_first, layer=3)
    assert ranks.score[0].tolist() == [float(position) for position in range(30)]
    assert seen[0].number == 3 and float(seen[0].share) == float(ranks.mass) == 30 * BUDGET
    received, weighed = seen[0].weigh((torch.ones(1, 30), None), (torch.ones(1, 30), seen[0].tokens.vision))
    torch.testing.assert_close(received.sums.sum(), torch.tensor(30.0))
    torch.testing.assert_close(weighed.sums[:, seen[0].tokens.vision[0]], received.sums[:, seen[0].tokens.vision[0]])
