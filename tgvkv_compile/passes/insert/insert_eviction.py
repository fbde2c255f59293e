"""Insert eviction: the kept KV of all layers goes into one arena, and the full KV is no longer returned."""

from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.dead_code import pin
from tgvkv_compile.fx.insert import insert_call, insert_item, insert_placeholder
from tgvkv_compile.fx.meta import BEGINS, output_nodes
from tgvkv_compile.ops.cache import packing
from tgvkv_compile.ops.cache.later_turns import vision_history
from tgvkv_compile.ops.cache.window import has_window, slots_before
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.state import CompactState, Prefilled
from tgvkv_compile.passes.cached import held_as
from tgvkv_compile.passes.inserted import Budgets, CappedLayers, LayerCandidates, Scores
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite
from tgvkv_compile.plan import GraphPlan


def insert_eviction(rewrite: Rewrite) -> None:
    """Ranks, packs and returns the compact state in place of the appended KV.

    Before::

        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_slots   : Sym(T)        = placeholder
        %tgvkv_arena   : Arena         = new_arena(%keys_0, %values_0, %tgvkv_slots)
        %tgvkv_room    : i64[]         = fitting_reserve(%tgvkv_budgets, %tgvkv_lengths, %tgvkv_arena, reserve)
        %tgvkv_starts  : i64[B, L]     = segment_starts(%tgvkv_budgets, %tgvkv_lengths, %tgvkv_room)
        %tgvkv_kept_l  : i64[B]        = by_layer(kept)[l]                # and %tgvkv_start_l
        %tgvkv_keep_l  : b8[B, N]      = select_tokens(%tgvkv_score_l, %tgvkv_tier_l, %tgvkv_types, %tgvkv_kept_l)
        %tgvkv_evict_l : None          = evict_into(%tgvkv_arena, %keys_l, %values_l, %tgvkv_keep_l, ...)
        %tgvkv_state   : Bookkeeping   = open_segments((%tgvkv_keep_0, ...), (%tgvkv_types, ...), %tgvkv_starts)
        %tgvkv_history : b8[B, N]      = vision_history(%tgvkv_types)
        return (None, None, ..., %logits, <CompactState>, <Prefilled>)

    Requires: `insert_budgeting` ran. Ensures: no output holds KV of the full length; the outputs keep their places,
    with None where KV was, followed by the tensors of `CompactState` and of `Prefilled`.
    Where caches have windows (`kv_dtype="int4"`), `open_window` follows each `evict_into`, and segments begin behind them.
    Where `insert_capping` capped, what it left is in the place of each layer's KV, scores and token types.
    """
    gm, plan, config = rewrite.gm, rewrite.plan, rewrite.config
    scores, budgets, sizes = rewrite.get(Scores), rewrite.get(Budgets), rewrite.get(ArenaSizes)
    capped = rewrite.has(CappedLayers)
    chosen = rewrite.get(CappedLayers).layers if capped else _all_tokens(plan, scores)
    outputs = output_nodes(gm)
    options = config.constants()
    held = held_as(config)
    slots = insert_placeholder(gm, "tgvkv_slots", rewrite.environment.symbol("tgvkv_slots", sizes.slots))
    with gm.graph.inserting_before(gm.graph.output_node()):
        call = _Caller(gm)
        kept = call.item(budgets.allocation, "kept", "tgvkv_kept")
        rate = call.item(budgets.allocation, "rate", "tgvkv_rate")
        positions = call.item(scores.token_types, "positions", "tgvkv_positions")
        lengths = call.item(scores.token_types, "lengths", "tgvkv_lengths")
        arena = call(packing.new_arena, chosen[0].key, chosen[0].value, slots, name="tgvkv_arena", **held)
        shared = (budgets.allocation, lengths)
        if has_window(config.kv_dtype):
            options["before"] = call(slots_before, kept, name="tgvkv_before", **held)
        room = call(packing.fitting_reserve, *shared, arena, sizes.reserve, name="tgvkv_room", **options)
        starts = call(packing.segment_starts, *shared, room, name="tgvkv_starts", **options)
        counts = call.items(call(packing.by_layer, kept, name="tgvkv_counts"), plan.num_layers, "tgvkv_kept")
        first = call.items(call(packing.by_layer, starts, name="tgvkv_firsts"), plan.num_layers, "tgvkv_start")
        keeps: list[Node] = []
        for layer, candidates in enumerate(chosen):
            ranked = (candidates.score, candidates.tier, candidates.token_types, counts[layer])
            keep = call(select_tokens, *ranked, name=f"tgvkv_keep_{layer}", sink_tokens=config.sink_tokens)
            keep.meta[BEGINS] = True
            keeps.append(keep)
            if capped:
                positions = call.item(candidates.token_types, "positions", f"tgvkv_positions_{layer}")
            kv = (candidates.key, candidates.value)
            where = (keep, positions, first[layer])
            pin(call(packing.evict_into, arena, *kv, *where, name=f"tgvkv_evict_{layer}", **held))
            if has_window(config.kv_dtype):
                newest = (*kv, positions, lengths, kept)
                pin(call(packing.open_window, arena, *newest, name=f"tgvkv_window_{layer}", layer=layer))
        token_types = tuple(candidates.token_types for candidates in chosen)
        opened = call(packing.open_segments, tuple(keeps), token_types, starts, name="tgvkv_state")
        opened.meta[BEGINS] = True
        state: dict[str, Any] = {
            "key_arena": call.item(arena, "key", "tgvkv_key_arena"),
            "value_arena": call.item(arena, "value", "tgvkv_value_arena"),
            "slot_position": call.item(arena, "slot_position", "tgvkv_slot_position"),
            "segment_start": starts,
            "segment_len": call.item(opened, "segment_len", "tgvkv_segment_len"),
            "next_slot": call.item(opened, "next_slot", "tgvkv_next_slot"),
            "protect_from": call.item(opened, "protect_from", "tgvkv_protect_from"),
            "keep_rate": rate,
            "lengths": lengths,
        }
        history = call(vision_history, scores.token_types, name="tgvkv_history")
        told: dict[str, Any] = {"history": history, "room": room, "valid": scores.valid}
    for site in plan.sites:
        outputs[site.key.output] = outputs[site.value.output] = None
    gm.graph.output_node().args = ((*outputs, *CompactState(**state), *Prefilled(**told)),)


def _all_tokens(plan: GraphPlan, scores: Scores) -> tuple[LayerCandidates, ...]:
    sites = zip(plan.sites, scores.score, scores.tier, strict=True)
    return tuple(
        LayerCandidates(site.key.node, site.value.node, score, tier, scores.token_types) for site, score, tier in sites
    )


class _Caller:
    """Shorthand for inserting calls one after the other."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm

    def __call__(self, function: Any, *args: Any, name: str, **kwargs: Any) -> Node:
        return insert_call(self._gm, function, *args, name=name, **kwargs)

    def item(self, node: Node, place: int | str, name: str) -> Node:
        return insert_item(self._gm, node, place, name=name)

    def items(self, node: Node, count: int, name: str) -> list[Node]:
        return [self.item(node, index, f"{name}_{index}") for index in range(count)]
