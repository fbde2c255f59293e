from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.decoder import (
    DIM,
    IMAGE,
    Decoder,
    additive,
    calls,
    capture,
    causal,
    features,
    flag,
    full_cache,
    masked,
    pasts,
    render,
    rewritten,
    tokens,
    values,
    written_out,
)
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.policy.rank import scores_from_attention
from tgvkv_compile.ops.token_types import classify_tokens
from tgvkv_compile.passes.inserted import Scores

FORMS: list[Any] = [
    pytest.param(flag, None, id="flag"),
    pytest.param(masked, causal(2, 19), id="masked"),
    pytest.param(masked, causal(2, 19, left=3), id="padded"),
    pytest.param(written_out, additive(causal(2, 19, left=3)), id="written-out"),
]


@pytest.mark.parametrize(("form", "mask"), FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scores_are_those_of_the_attention(form: Any, mask: Tensor | None, kv_heads: int) -> None:
    gm, inputs = capture(Decoder(form, kv_heads=kv_heads), tokens(2), features(2), None, mask)
    result = rewritten(gm, inputs, "insert_scoring")
    assert len(result.get(Scores).mass) == len(result.get(Scores).score) == 2
    got = values(result.gm, inputs)
    hidden = 0 if mask is None else 3 if not bool((mask[0, 0, -1] == mask[0, 0, -1, -1])[0]) else 0
    visible = causal(2, 19, left=hidden)
    valid = visible[:, 0, -1]
    token_types = classify_tokens(tokens(2) == IMAGE, valid)
    for layer, site in enumerate(result.plan.sites):
        q, k = got[site.query.name], got[site.key.node.name]
        attention = attention_probabilities(q, k, visible, DIM**-0.5).mean(1)
        mass, score = scores_from_attention(attention, visible[:, 0], token_types)
        torch.testing.assert_close(got[f"tgvkv_mass_{layer}"], mass)
        torch.testing.assert_close(got[f"tgvkv_score_{layer}"], score)
    # Scoring touches nothing that the model computes.
    normalised = values(rewritten(gm, inputs, "normalise_attention").gm, inputs)["output"]
    for old, new in zip(normalised, got["output"], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_operations() -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(), features())
    assert "rank_tokens" not in calls(rewritten(gm, inputs, "normalise_attention").gm)
    called = calls(rewritten(gm, inputs, "insert_scoring").gm)
    assert called.count("rank_tokens") == 3
    assert called.count("classify_tokens") == called.count("vision_positions") == 1
    assert "valid_columns" not in called
    gm, inputs = capture(Decoder(masked), tokens(), features(), None, causal(1, 19))
    assert calls(rewritten(gm, inputs, "insert_scoring").gm).count("valid_columns") == 1


def test_golden() -> None:
    gm, inputs = capture(Decoder(masked, layers=1), tokens(), features(), None, causal(1, 19))
    assert_expected_inline(
        render(rewritten(gm, inputs, "insert_scoring").gm),
        """\
%tgvkv_vision : bool[1, 19] = vision_positions((%unsqueeze))
%tgvkv_valid : bool[1, 19] = valid_columns(%l_mask_, %q)
%tgvkv_types : TokenTypes = classify_tokens(%tgvkv_vision, %tgvkv_valid)
%tgvkv_attention_0 : AttentionWithLse = scaled_dot_product_attention_with_lse(%q, %keys, %values, %l_mask_, False, 0.5)
%tgvkv_output_0 : f32[1, 4, 19, 4] = getitem(%tgvkv_attention_0, 0)
%tgvkv_lse_0 : f32[1, 4, 19] = getitem(%tgvkv_attention_0, 1)
%tgvkv_ranks_0 : TokenRanks = rank_tokens(%q, %keys, %tgvkv_types, %l_mask_, False, 0.5, %tgvkv_lse_0, budget=0.4, budget_of='all', ranking='twr')
%tgvkv_mass_0 : f32[1] = getitem(%tgvkv_ranks_0, 0)
%tgvkv_score_0 : f32[1, 19] = getitem(%tgvkv_ranks_0, 1)
%tgvkv_tier_0 : i64[1, 19] = getitem(%tgvkv_ranks_0, 2)""",
    )


def test_nothing_of_size_n_times_n_is_inserted() -> None:
    gm, inputs = capture(Decoder(written_out), tokens(), features())
    result = rewritten(gm, inputs, "insert_scoring").gm
    for node in result.graph.nodes:
        value = node.meta.get("example_value")
        assert not (isinstance(value, Tensor) and list(value.shape[-2:]) == [19, 19]), node


def test_other_graphs_get_no_scores() -> None:
    gm, inputs = capture(Decoder(), tokens()[:, :1], None, full_cache(7))
    for compressed in (frozenset(), pasts(gm)):
        assert "rank_tokens" not in calls(rewritten(gm, inputs, compressed=compressed).gm)
