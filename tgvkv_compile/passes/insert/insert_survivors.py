"""Insert survivors: a later turn with new vision attends to what each layer still holds, and to itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_placeholder
from tgvkv_compile.fx.meta import fake_tensor, output_nodes
from tgvkv_compile.ops.attention.masks import vision_positions
from tgvkv_compile.ops.cache.later_turns import candidate_mask, candidate_token_types, join_candidates, turn_token_types
from tgvkv_compile.ops.state import Survivors
from tgvkv_compile.passes.cached import past_inputs
from tgvkv_compile.passes.inserted import Candidates
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite
from tgvkv_compile.plan import AttentionSite, KVAppend


class Held(NamedTuple):
    """Nodes of what one layer holds: `Survivors` in a graph."""

    key: Node
    value: Node
    positions: Node


def insert_survivors(rewrite: Rewrite) -> None:
    """Gives every layer its candidates: the survivors, in position order, and the new tokens.

    Before::

        %keys_l : [B, Hkv, S+Q, D] = cat([%past_keys_l, %k_l], dim=-2)                # the past is a handle
        %out_l  : [B, H, Q, D]     = scaled_dot_product_attention(%q_l, %keys_l, %values_l, %mask)
        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_history   : b8[B, P]            = placeholder                           # which positions are vision
        %tgvkv_lengths   : i64[B]              = placeholder
        %tgvkv_keep_rate : f32[B, L]           = placeholder
        %tgvkv_key_l     : [B, Hkv, W_l, D]    = placeholder                           # and %tgvkv_value_l
        %tgvkv_positions_l : i64[B, W_l]       = placeholder                           # -1 where empty
        %tgvkv_new       : TokenTypes          = turn_token_types(%vision, %mask, %tgvkv_lengths)
        %tgvkv_types_l   : TokenTypes          = candidate_token_types(%tgvkv_history, %tgvkv_positions_l, %tgvkv_new)
        %tgvkv_mask_l    : b8[B, 1, Q, W_l+Q]  = candidate_mask(%mask, %tgvkv_positions_l, %vision)
        %tgvkv_keys_l    : [B, Hkv, W_l+Q, D]  = join_candidates(%tgvkv_key_l, %k_l)   # and %tgvkv_values_l
        %out_l : as before                                                             # on the handles still
        return (%tgvkv_keys_0, %tgvkv_values_0, ..., %logits)

    Requires: a plan of a later turn with new vision. Ensures: the sites of the plan are on the candidates, so that
    `normalise_attention` attends to them; no handle is an output any more.
    """
    pasts = past_inputs(rewrite.plan)
    history, lengths, keep_rate = _insert_shared(rewrite)
    held = [_insert_layer(rewrite, layer) for layer in range(rewrite.plan.num_layers)]
    insert_candidates(rewrite, history, lengths, keep_rate, held, pasts=pasts)


def insert_candidates(
    rewrite: Rewrite,
    history: Node,
    lengths: Node,
    keep_rate: Node,
    held: Sequence[Held],
    *,
    pasts: tuple[Node, ...] = (),
) -> None:
    """Puts what each layer holds, and the new tokens behind it, in the place of its joined KV.

    Args:
        rewrite: The graph; its sites are on the candidates afterwards.
        history: b8[B, P], which positions before this turn are vision.
        lengths: i64[B], tokens so far.
        keep_rate: f32[B, L], before this turn.
        held: Of each layer, the nodes of what it holds.
        pasts: The inputs that held the past, where nothing is to read them any more.
    """
    gm, plan = rewrite.gm, rewrite.plan
    assert plan.modality is not None
    outputs = output_nodes(gm)
    with gm.graph.inserting_before(plan.sites[0].node):
        vision = insert_call(gm, vision_positions, tuple(plan.modality.masks), name="tgvkv_vision")
        new = insert_call(gm, turn_token_types, vision, plan.sites[0].mask, lengths, name="tgvkv_new")
    token_types: list[Node] = []
    sites: list[AttentionSite] = []
    for layer, (site, own) in enumerate(zip(plan.sites, held, strict=True)):
        with gm.graph.inserting_before(site.node):
            token_types.append(insert_call(gm, candidate_token_types, history, own.positions, new, name=f"tgvkv_types_{layer}"))
            mask = insert_call(gm, candidate_mask, site.mask, own.positions, vision, name=f"tgvkv_mask_{layer}")
            keys = insert_call(gm, join_candidates, own.key, site.key.new, name=f"tgvkv_keys_{layer}")
            values = insert_call(gm, join_candidates, own.value, site.value.new, name=f"tgvkv_values_{layer}")
        outputs[site.key.output], outputs[site.value.output] = keys, values
        joined = (
            KVAppend(keys, own.key, site.key.new, site.key.output),
            KVAppend(values, own.value, site.value.new, site.value.output),
        )
        sites.append(dataclasses.replace(site, key=joined[0], value=joined[1], mask=mask, is_causal=False))
    gm.graph.output_node().args = (tuple(outputs),)
    rewrite.plan = dataclasses.replace(plan, sites=tuple(sites))
    rewrite.leave(Candidates(new, tuple(token_types), history, keep_rate, pasts))


def _insert_shared(rewrite: Rewrite) -> list[Node]:
    """Inputs that all layers share: `history`, `lengths`, `keep_rate`."""
    env, layers = rewrite.environment, rewrite.plan.num_layers
    past = fake_tensor(past_inputs(rewrite.plan)[0])
    batch, length, device = past.shape[0], past.shape[2], past.device
    fakes = {
        "history": env.tensor((batch, length), torch.bool, device),
        "lengths": env.tensor((batch,), torch.int64, device),
        "keep_rate": env.tensor((batch, layers), torch.float32, device),
    }
    return [insert_placeholder(rewrite.gm, f"tgvkv_{name}", fake) for name, fake in fakes.items()]


def _insert_layer(rewrite: Rewrite, layer: int) -> Held:
    """Inputs of one layer's survivors, which have a width of their own."""
    env, layers = rewrite.environment, rewrite.plan.num_layers
    site = rewrite.plan.sites[0]
    assert site.key.past is not None and site.value.past is not None
    batch, heads, _, dim = fake_tensor(site.key.past).shape
    width = env.symbol(f"tgvkv_width_{layer}", max(2, rewrite.get(ArenaSizes).slots // layers))
    key, value = (fake_tensor(past) for past in (site.key.past, site.value.past))
    fakes = Survivors(
        key=env.tensor((batch, heads, width, dim), key.dtype, key.device),
        value=env.tensor((batch, heads, width, dim), value.dtype, key.device),
        positions=env.tensor((batch, width), torch.int64, key.device),
    )
    nodes: Any = {name: insert_placeholder(rewrite.gm, f"tgvkv_{name}_{layer}", fake) for name, fake in fakes._asdict().items()}
    return Held(**nodes)
