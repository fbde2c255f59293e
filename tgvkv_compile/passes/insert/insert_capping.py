"""Insert capping: a layer's KV beyond what it could keep goes before the next layer's comes."""

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.ops.eviction.capping import Capped, cap_layer
from tgvkv_compile.passes.inserted import CappedLayers, LayerCandidates, Scores
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite


def insert_capping(rewrite: Rewrite) -> None:
    """Picks each layer's candidates right behind its scores, where a prefill has a cap.

    Before::

        %keys_l, %values_l : [B, Hkv, N, D]                    # alive until eviction, after the last layer
        %tgvkv_scores_l    : (f32[B], f32[B, N])

    After::

        %tgvkv_capped_l : Capped = cap_layer(%keys_l, %values_l, %tgvkv_score_l, %tgvkv_tier_l, %tgvkv_types, cap, ...)
        %tgvkv_capped_key_l, %tgvkv_capped_value_l : [B, Hkv, C, D]
        %tgvkv_capped_score_l, %tgvkv_capped_tier_l : f32[B, C], i64[B, C]
        %tgvkv_capped_token_types_l : TokenTypes

    Requires: `insert_scoring` ran, in a prefill whose budget is of the whole prompt. Ensures: eviction needs no KV of the full
    length. Exact where no layer is to keep more than `C`, `cap` times the mean budget.
    """
    cap = rewrite.get(ArenaSizes).prefill_cap
    if cap is None:
        return
    gm, plan, config, scores = rewrite.gm, rewrite.plan, rewrite.config, rewrite.get(Scores)
    found = []
    for layer, (site, score, tier) in enumerate(zip(plan.sites, scores.score, scores.tier, strict=True)):
        with gm.graph.inserting_after(tier):
            kv = (site.key.node, site.value.node)
            options = (cap, config.limit, config.sink_tokens)
            capped = insert_call(gm, cap_layer, *kv, score, tier, scores.token_types, *options, name=f"tgvkv_capped_{layer}")
        parts = []
        for part in reversed(Capped._fields):
            with gm.graph.inserting_after(capped):
                parts.append(insert_item(gm, capped, part, name=f"tgvkv_capped_{part}_{layer}"))
        found.append(LayerCandidates(*reversed(parts)))
    rewrite.leave(CappedLayers(tuple(found)))
