"""Insert fixed eviction: every layer of an exported prefill packs what it keeps into slots of its own."""

from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.static.prefill import fit_layers, static_protected_from
from tgvkv_compile.ops.static.selection import PackedLayer, pack_layer, select_in_layers
from tgvkv_compile.passes.inserted import Scores
from tgvkv_compile.passes.rewrite import Rewrite, StaticPrefill


def insert_fixed_eviction(rewrite: Rewrite) -> None:
    """Budgets, ranks, packs and returns the compact cache in place of the appended KV.

    Before::

        return (%logits, %keys_0, %values_0, ...)

    After::

        %tgvkv_budgets  : (i64[B, L], f32[B, L])      = fit_layers((%tgvkv_mass_0, ...), %tgvkv_types, capacities, new_tokens)
        %tgvkv_keep     : b8[B, N] * L                = select_in_layers((%tgvkv_score_0, ...), (%tgvkv_tier_0, ...), ...)
        %tgvkv_packed_l : PackedLayer                 = pack_layer(%keys_l, %values_l, positions, %tgvkv_keep[l], C_l)
        %tgvkv_protect_from : i64[B, L]               = static_protected_from(%tgvkv_keep, %tgvkv_types)
        return (%logits, K_0, V_0, slot_position_0, ..., %tgvkv_protect_from, rate, lengths)

    Requires: `insert_fixed_scoring` ran; the graph's first output is the logits, the others are the KV. Ensures: the cache
    that is returned has the capacities of the budget plan and no more.
    """
    gm, config, scores, sizes = rewrite.gm, rewrite.config, rewrite.get(Scores), rewrite.get(StaticPrefill)
    logits = output_nodes(gm)[0]
    options = config.constants()
    with gm.graph.inserting_before(gm.graph.output_node()):
        wanted = (scores.mass, scores.token_types, sizes.capacities, sizes.new_tokens)
        budgets = insert_call(gm, fit_layers, *wanted, name="tgvkv_budgets", **options)
        kept, rate = (insert_item(gm, budgets, field, name=f"tgvkv_{field}") for field in ("kept", "rate"))
        positions, lengths = (
            insert_item(gm, scores.token_types, field, name=f"tgvkv_{field}") for field in ("positions", "lengths")
        )
        ranked = (scores.score, scores.tier, scores.token_types, kept)
        keeps = insert_call(gm, select_in_layers, *ranked, name="tgvkv_keep", sink_tokens=config.sink_tokens)
        returned: list[Node] = [logits]
        for layer, site in enumerate(rewrite.plan.sites):
            keep = insert_item(gm, keeps, layer, name=f"tgvkv_keep_{layer}")
            kv = (site.key.node, site.value.node)
            packed = insert_call(gm, pack_layer, *kv, positions, keep, sizes.capacities[layer], name=f"tgvkv_packed_{layer}")
            returned += [insert_item(gm, packed, part, name=f"tgvkv_{part}_{layer}") for part in PackedLayer._fields]
        protect = insert_call(gm, static_protected_from, keeps, scores.token_types, name="tgvkv_protect_from")
    gm.graph.output_node().args = ((*returned, protect, rate, lengths),)
