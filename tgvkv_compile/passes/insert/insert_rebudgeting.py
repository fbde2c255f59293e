"""Insert rebudgeting: a later turn with new vision scores, budgets and ranks all candidates again."""

from typing import Any

from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.cache.later_turns import allocate_again, extend_history
from tgvkv_compile.ops.cache.packing import allocated_by, by_layer, protected_from
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.state import Choice, Reselected
from tgvkv_compile.passes.cached import drop_pasts
from tgvkv_compile.passes.insert.insert_scoring import rank_layers
from tgvkv_compile.passes.inserted import Candidates
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.passes.told import told


def insert_rebudgeting(rewrite: Rewrite) -> None:
    """Says which candidates of every layer are kept; the runtime packs them into a new arena.

    Before::

        %out_l, %lse_l = scaled_dot_product_attention_with_lse(%q_l, %tgvkv_keys_l, %tgvkv_values_l, %tgvkv_mask_l, ...)
        return (%tgvkv_keys_0, %tgvkv_values_0, ..., %logits)

    After::

        %tgvkv_ranks_l   : TokenRanks     = rank_tokens(%q_l, %tgvkv_keys_l, %tgvkv_types_l, %tgvkv_mask_l, ...)
        %tgvkv_budgets   : Allocation     = allocate_again((%tgvkv_mass_0, ...), (%tgvkv_types_0, ...), %tgvkv_history, ...)
        %tgvkv_keep_l    : b8[B, W_l+Q]   = select_tokens(%tgvkv_score_l, %tgvkv_tier_l, %tgvkv_types_l, kept[:, l])
        %tgvkv_at_l      : i64[B, W_l+Q]  = %tgvkv_types_l.positions
        %tgvkv_protected : i64[B, L]      = protected_from((%tgvkv_keep_0, ...), (%tgvkv_types_0, ...))
        %tgvkv_seen      : b8[B, P+Q]     = extend_history(%tgvkv_history, %tgvkv_new)
        return (%tgvkv_keys_0, %tgvkv_values_0, ..., %logits, <Choice of layer 0>, ..., <Reselected>)

    Requires: `insert_survivors` or `insert_whole_past` ran, and `normalise_attention`. Ensures: nothing inserted holds
    attention of all rows; the outputs keep their places, the candidates in those of keys and values, followed by the
    `Choice` of each layer and `Reselected`; no past is an input any more.
    """
    gm, config, candidates = rewrite.gm, rewrite.config, rewrite.get(Candidates)
    options = config.constants()
    token_types = candidates.token_types
    masses, scores, tiers = rank_layers(rewrite, token_types)
    outputs = output_nodes(gm)
    keeps: list[Node] = []
    choices: list[Any] = []
    with gm.graph.inserting_before(gm.graph.output_node()):
        shared = (candidates.history, candidates.new, candidates.keep_rate)
        function = allocated_by(allocate_again, config.budgeting)
        with told("budgeting", config.budgeting):
            budgets = insert_call(gm, function, masses, token_types, *shared, name="tgvkv_budgets", **options)
        kept = insert_item(gm, budgets, "kept", name="tgvkv_kept")
        rate = insert_item(gm, budgets, "rate", name="tgvkv_rate")
        counts = insert_call(gm, by_layer, kept, name="tgvkv_counts")
        for layer, score in enumerate(scores):
            count = insert_item(gm, counts, layer, name=f"tgvkv_kept_{layer}")
            ranked = (score, tiers[layer], token_types[layer], count)
            keep = insert_call(gm, select_tokens, *ranked, name=f"tgvkv_keep_{layer}", sink_tokens=config.sink_tokens)
            keeps.append(keep)
            choice: dict[str, Any] = {"keep": keep}
            choice["positions"] = insert_item(gm, token_types[layer], "positions", name=f"tgvkv_at_{layer}")
            choices += Choice(**choice)
        decided: dict[str, Any] = {
            "kept": kept,
            "keep_rate": rate,
            "protect_from": insert_call(gm, protected_from, tuple(keeps), token_types, name="tgvkv_protected"),
            "lengths": insert_item(gm, candidates.new, "lengths", name="tgvkv_lengths_next"),
            "valid": insert_item(gm, candidates.new, "valid", name="tgvkv_valid"),
            "history": insert_call(gm, extend_history, candidates.history, candidates.new, name="tgvkv_seen"),
        }
    gm.graph.output_node().args = ((*outputs, *choices, *Reselected(**decided)),)
    drop_pasts(gm, candidates.pasts)
