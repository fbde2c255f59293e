"""Insert fixed scoring: attention and scores of an exported prefill, in blocks of rows."""

import dataclasses

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.ops.static.prefill import attend_and_score, token_types_from_mask
from tgvkv_compile.passes.inserted import Scores
from tgvkv_compile.passes.rewrite import Rewrite, StaticPrefill


def insert_fixed_scoring(rewrite: Rewrite) -> None:
    """Replaces every attention by one that scores as well.

    Before::

        %out_l : [B, H, N, D] = scaled_dot_product_attention(%q_l, [repeat_kv](%keys_l), [repeat_kv](%values_l), %mask)

    After::

        %tgvkv_types    : TokenTypes = token_types_from_mask((%modality_mask,), %attention_mask)
        %tgvkv_scored_l : Scored = attend_and_score(%q_l, %keys_l, %values_l, %tgvkv_types, scale, blocks, question_rows)
        %out_l          : [B, H, N, D] = %tgvkv_scored_l.output

    Requires: a prefill plan whose masks are causal among valid tokens: they are not read any more. Ensures: no node holds
    `[.., N, N]`, and none has a shape that depends on data; no site
    has a mask.
    """
    gm, plan, config, sizes = rewrite.gm, rewrite.plan, rewrite.config, rewrite.get(StaticPrefill)
    assert plan.modality is not None
    masses, scores, tiers = [], [], []
    with gm.graph.inserting_before(plan.sites[0].node):
        token_types = insert_call(
            gm, token_types_from_mask, tuple(plan.modality.masks), sizes.attention_mask, name="tgvkv_types"
        )
    for layer, site in enumerate(plan.sites):
        with gm.graph.inserting_before(site.node):
            scored = insert_call(
                gm,
                attend_and_score,
                site.query,
                site.key.node,
                site.value.node,
                token_types,
                site.scale,
                sizes.blocks,
                sizes.question_rows,
                name=f"tgvkv_scored_{layer}",
                layer=layer,
                **config.for_ranking(),
            )
            out = insert_item(gm, scored, "output", name=f"tgvkv_output_{layer}")
            masses.append(insert_item(gm, scored, "mass", name=f"tgvkv_mass_{layer}"))
            scores.append(insert_item(gm, scored, "score", name=f"tgvkv_score_{layer}"))
            tiers.append(insert_item(gm, scored, "tier", name=f"tgvkv_tier_{layer}"))
        site.node.replace_all_uses_with(out)
    rewrite.plan = dataclasses.replace(plan, sites=tuple(dataclasses.replace(site, mask=None) for site in plan.sites))
    rewrite.leave(Scores(token_types, sizes.attention_mask, tuple(masses), tuple(scores), tuple(tiers)))
