"""The two passes of a later turn with new vision: `insert_survivors` and `insert_rebudgeting`."""

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
    full_cache,
    masked,
    pasts,
    render,
    rewritten,
    tokens,
    values,
    written_out,
)
from tests.support.oracle import Oracle
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.state import Reselected, split_off

PAST, NEW = 9, 19


def captured(form: Any = masked, *, left: int = 0, layers: int = 2, kv_heads: int = 2) -> tuple[Any, list[Any], Any]:
    """A turn of two samples on a cache; the first `left` new tokens of sample 0 are padding."""
    mask = causal(2, NEW, past=PAST)
    mask[0, :, :, PAST : PAST + left] = False
    cache = full_cache(PAST, batch=2, layers=layers, kv_heads=kv_heads)
    model = Decoder(form, layers=layers, kv_heads=kv_heads)
    gm, inputs = capture(model, tokens(2), features(2), cache, mask if form is masked else additive(mask))
    return gm, inputs, cache


def survivors_of(cache: Any, kept: list[list[int]]) -> list[Tensor]:
    """Inputs of the graph: of a cache of `PAST` tokens, each layer still holds `kept`; positions 3 and 4 are vision."""
    history = torch.zeros(2, PAST, dtype=torch.bool)
    history[:, 3:5] = True
    inputs = [history, torch.full((2,), PAST), torch.full((2, len(kept)), 0.5)]
    for (keys, values_), positions in zip(cache, kept, strict=True):
        inputs += [keys[:, :, positions], values_[:, :, positions], torch.tensor(positions).expand(2, -1)]
    return inputs


def run_turn(gm: Any, inputs: list[Any], result: Any, survivors: list[Tensor]) -> dict[str, Any]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    held = pasts(gm)
    rest = [value for node, value in zip(placeholders, inputs, strict=True) if node.name not in held]
    return values(result.gm, [*rest, *survivors])


KEPT = [[0, 1, 2, 3, 4, 8], [0, 2, 3, 5, 6, 7, 8]]


@pytest.mark.parametrize(("form", "left", "kv_heads"), [(masked, 0, 4), (masked, 3, 2), (written_out, 3, 2)])
@pytest.mark.parametrize("budget", [0.4, 12])
def test_a_turn_is_the_oracles(form: Any, left: int, kv_heads: int, budget: float | int) -> None:
    config = EvictionConfig(budget)
    gm, inputs, cache = captured(form, left=left, kv_heads=kv_heads)
    result = rewritten(gm, inputs, compressed=pasts(gm), config=config)
    assert result.plan.kind == "vision_continuation" and result.plan.misses == ()
    got = run_turn(gm, inputs, result, survivors_of(cache, KEPT))
    outputs = got["output"]
    _, decided = split_off(outputs, Reselected)
    assert decided.lengths.tolist() == [PAST + NEW - left, PAST + NEW]
    for sample in range(2):
        first = left if sample == 0 else 0
        oracle = Oracle(config)
        oracle.kept, oracle._vision = [list(kept) for kept in KEPT], [3 <= p < 5 for p in range(PAST)]
        oracle._totals, oracle._generated, oracle._protected, oracle.suffix = [PAST] * 2, [0] * 2, [[8]] * 2, [1] * 2
        attention = []
        for layer, site in enumerate(result.plan.sites):
            width = len(KEPT[layer])
            columns = [*range(width), *range(width + first, width + NEW)]
            q, k = got[site.query.name][sample : sample + 1, :, first:], got[site.key.node.name][sample : sample + 1]
            seen = torch.ones(NEW - first, len(columns), dtype=torch.bool).tril(width)
            attention.append(attention_probabilities(q, k[:, :, columns], seen[None, None], DIM**-0.5)[0])
        oracle.extend_with_vision(attention, (tokens(2) == IMAGE)[sample, first:])
        for layer, site in enumerate(result.plan.sites):
            keep, at = got[f"tgvkv_keep_{layer}"][sample], got[f"tgvkv_at_{layer}"][sample]
            assert at[keep].tolist() == oracle.kept[layer]
            assert outputs[site.key.output].shape[2] == len(KEPT[layer]) + NEW
            assert int(decided.protect_from[sample, layer]) == oracle._protected[layer][0]
        torch.testing.assert_close(decided.keep_rate[sample], oracle.rate)
        assert decided.history[sample].nonzero()[:, 0].tolist() == [p for p, seen in enumerate(oracle._vision) if seen]


def test_a_turn_on_everything_is_the_uncompressed_turn() -> None:
    gm, inputs, cache = captured(left=2)
    result = rewritten(gm, inputs, compressed=pasts(gm), config=EvictionConfig(1.0))
    expected = values(gm, inputs)["output"]
    outputs = run_turn(gm, inputs, result, survivors_of(cache, [list(range(PAST))] * 2))["output"]
    for index, node in enumerate(output_nodes(gm)):
        if "linear" in node.name:
            torch.testing.assert_close(outputs[index][:, 2:], expected[index][:, 2:])
    _, decided = split_off(outputs, Reselected)
    assert decided.kept.tolist() == [[PAST + NEW - 2] * 2, [PAST + NEW] * 2] and decided.keep_rate.eq(1).all()
    # Survivors may come padded, sample by sample: what is not there is not seen.
    padded = survivors_of(cache, [list(range(PAST))] * 2)
    for layer in range(2):
        where = slice(3 + 3 * layer, 5 + 3 * layer)
        padded[where] = [torch.cat([kv, torch.full_like(kv[:, :, :3], 9.0)], dim=2) for kv in padded[where]]
        positions = padded[5 + 3 * layer]
        padded[5 + 3 * layer] = torch.cat([positions, torch.full_like(positions[:, :3], -1)], dim=1)
    again = run_turn(gm, inputs, result, padded)["output"]
    for old, new in zip(decided, split_off(again, Reselected)[1], strict=True):
        torch.testing.assert_close(new, old)


def test_operations() -> None:
    gm, inputs, _ = captured(layers=3)
    held = pasts(gm)
    before = calls(gm).count("scaled_dot_product_attention")
    first = rewritten(gm, inputs, "insert_survivors", compressed=held)
    called = calls(first.gm)
    assert called.count("candidate_token_types") == called.count("candidate_mask") == 3
    assert called.count("join_candidates") == 6 and called.count("turn_token_types") == 1
    assert called.count("scaled_dot_product_attention") == before == 3  # still on the handles
    called = calls(rewritten(gm, inputs, compressed=held).gm)
    assert called.count("scaled_dot_product_attention_with_lse") == called.count("rank_tokens") == 3
    assert called.count("select_tokens") == 3 and called.count("allocate_again") == called.count("protected_from") == 1
    assert "scaled_dot_product_attention" not in called and "cat" not in called
    # Without handles the past is taken as it is; without new vision, neither pass has anything to do.
    assert "whole_past" not in called and "whole_past" in calls(rewritten(gm, inputs).gm)
    other, given = capture(Decoder(masked), tokens()[:, :5], None, full_cache(7), causal(1, 5, past=7))
    assert "candidate_token_types" not in calls(rewritten(other, given, compressed=pasts(other)).gm)


def test_no_handle_is_left() -> None:
    gm, inputs, _ = captured()
    result = rewritten(gm, inputs, compressed=pasts(gm))
    assert pasts(gm) and not pasts(result.gm)
    sites = result.plan.sites
    widths = {str(output_nodes(result.gm)[append.output].meta["example_value"].shape[2]) for append in _appends(sites)}
    assert len(widths) == 2 and str(PAST + NEW) not in widths  # each layer's own


def _appends(sites: Any) -> list[Any]:
    return [append for site in sites for append in (site.key, site.value)]


def test_golden() -> None:
    gm, inputs, _ = captured(layers=1)
    result = rewritten(gm, inputs, compressed=pasts(gm))
    assert_expected_inline(
        render(result.gm),
        """\
%tgvkv_history : bool[2, 9] = placeholder
%tgvkv_lengths : i64[2] = placeholder
%tgvkv_keep_rate : f32[2, 1] = placeholder
%tgvkv_key_0 : f32[2, 2, sym, 4] = placeholder
%tgvkv_value_0 : f32[2, 2, sym, 4] = placeholder
%tgvkv_positions_0 : i64[2, sym] = placeholder
%tgvkv_vision : bool[2, 19] = vision_positions((%unsqueeze))
%tgvkv_new : TokenTypes = turn_token_types(%tgvkv_vision, %l_mask_, %tgvkv_lengths)
%tgvkv_types_0 : TokenTypes = candidate_token_types(%tgvkv_history, %tgvkv_positions_0, %tgvkv_new)
%tgvkv_mask_0 : bool[2, 1, 19, sym] = candidate_mask(%l_mask_, %tgvkv_positions_0, %tgvkv_vision)
%tgvkv_keys_0 : f32[2, 2, sym, 4] = join_candidates(%tgvkv_key_0, %k)
%tgvkv_values_0 : f32[2, 2, sym, 4] = join_candidates(%tgvkv_value_0, %v)
%tgvkv_attention_0 : AttentionWithLse = scaled_dot_product_attention_with_lse(%q, %tgvkv_keys_0, %tgvkv_values_0, %tgvkv_mask_0, False, 0.5)
%tgvkv_output_0 : f32[2, 4, 19, 4] = getitem(%tgvkv_attention_0, 0)
%tgvkv_lse_0 : f32[2, 4, 19] = getitem(%tgvkv_attention_0, 1)
%tgvkv_ranks_0 : TokenRanks = rank_tokens(%q, %tgvkv_keys_0, %tgvkv_types_0, %tgvkv_mask_0, False, 0.5, %tgvkv_lse_0, budget=0.4, budget_of='all', ranking='twr')
%tgvkv_mass_0 : f32[2] = getitem(%tgvkv_ranks_0, 0)
%tgvkv_score_0 : f32[2, sym] = getitem(%tgvkv_ranks_0, 1)
%tgvkv_tier_0 : i64[2, sym] = getitem(%tgvkv_ranks_0, 2)
%tgvkv_budgets : Allocation = allocate_again((%tgvkv_mass_0), (%tgvkv_types_0), %tgvkv_history, %tgvkv_new, %tgvkv_keep_rate, budget=0.4, budget_of='all', budgeting='tvb', decode='ratio', sink_tokens=4)
%tgvkv_kept : i64[2, 1] = getitem(%tgvkv_budgets, 0)
%tgvkv_rate : f32[2, 1] = getitem(%tgvkv_budgets, 1)
%tgvkv_counts : tuple = by_layer(%tgvkv_kept)
%tgvkv_kept_0 : i64[2] = getitem(%tgvkv_counts, 0)
%tgvkv_keep_0 : bool[2, sym] = select_tokens(%tgvkv_score_0, %tgvkv_tier_0, %tgvkv_types_0, %tgvkv_kept_0, sink_tokens=4)
%tgvkv_at_0 : i64[2, sym] = getitem(%tgvkv_types_0, 3)
%tgvkv_protected : i64[2, 1] = protected_from((%tgvkv_keep_0), (%tgvkv_types_0))
%tgvkv_lengths_next : i64[2] = getitem(%tgvkv_new, 4)
%tgvkv_valid : bool[2, 19] = getitem(%tgvkv_new, 0)
%tgvkv_seen : bool[2, 28] = extend_history(%tgvkv_history, %tgvkv_new)""",
    )
