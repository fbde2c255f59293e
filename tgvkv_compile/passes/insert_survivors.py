"""Insert survivors: a later turn with new vision attends to what each layer still holds, and to itself."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.insert import insert_call, insert_placeholder
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.graph_masks import vision_positions
from tgvkv_compile.ops.state import Survivors
from tgvkv_compile.ops.turns import candidate_mask, candidate_roles, join_candidates, turn_roles
from tgvkv_compile.passes.cached import past_inputs
from tgvkv_compile.passes.inserted import Candidates
from tgvkv_compile.plan import AttentionSite, KVAppend, Plan


def insert_survivors(
    gm: GraphModule, plan: Plan, shared: Sequence[Tensor], survivors: Sequence[Survivors]
) -> tuple[Plan, Candidates]:
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
        %tgvkv_new       : Roles               = turn_roles(%vision, %mask, %tgvkv_lengths)
        %tgvkv_roles_l   : Roles               = candidate_roles(%tgvkv_history, %tgvkv_positions_l, %tgvkv_new)
        %tgvkv_mask_l    : b8[B, 1, Q, W_l+Q]  = candidate_mask(%mask, %tgvkv_positions_l, %vision)
        %tgvkv_keys_l    : [B, Hkv, W_l+Q, D]  = join_candidates(%tgvkv_key_l, %k_l)   # and %tgvkv_values_l
        %out_l : as before                                                             # on the handles still
        return (%tgvkv_keys_0, %tgvkv_values_0, ..., %logits)

    Requires: a plan of a turn with new vision. Ensures: the sites of the returned plan are on the candidates, so that
    `normalise_attention` attends to them; no handle is an output any more.

    Args:
        gm: The graph.
        plan: Its plan.
        shared: Fake values of the inputs `history`, `lengths` and `keep_rate`.
        survivors: Fake values of the inputs of each layer.
    """
    pasts = past_inputs(plan)
    history, lengths, keep_rate = (
        insert_placeholder(gm, f"tgvkv_{name}", value)
        for name, value in zip(("history", "lengths", "keep_rate"), shared, strict=True)
    )
    inputs = [_insert_survivors(gm, layer, part) for layer, part in enumerate(survivors)]
    plan, candidates = insert_candidates(gm, plan, (history, lengths, keep_rate), inputs)
    return plan, dataclasses.replace(candidates, pasts=pasts)


def insert_candidates(
    gm: GraphModule, plan: Plan, shared: tuple[Node, Node, Node], held: Sequence[tuple[Node, Node, Node]]
) -> tuple[Plan, Candidates]:
    """Puts what each layer holds, and the new tokens behind it, in the place of its joined KV.

    Args:
        gm: The graph.
        plan: Its plan.
        shared: `history`, `lengths` and `keep_rate`.
        held: Of each layer what `Survivors` has.

    Returns:
        The plan, its sites on the candidates, and the candidates; no past among them.
    """
    assert plan.modality is not None
    history, lengths, keep_rate = shared
    outputs = output_nodes(gm)
    with gm.graph.inserting_before(plan.sites[0].node):
        vision = insert_call(gm, vision_positions, tuple(plan.modality.masks), name="tgvkv_vision")
        new = insert_call(gm, turn_roles, vision, plan.sites[0].mask, lengths, name="tgvkv_new")
    roles: list[Node] = []
    sites: list[AttentionSite] = []
    for layer, (site, (key, value, positions)) in enumerate(zip(plan.sites, held, strict=True)):
        with gm.graph.inserting_before(site.node):
            roles.append(insert_call(gm, candidate_roles, history, positions, new, name=f"tgvkv_roles_{layer}"))
            mask = insert_call(gm, candidate_mask, site.mask, positions, vision, name=f"tgvkv_mask_{layer}")
            keys = insert_call(gm, join_candidates, key, site.key.new, name=f"tgvkv_keys_{layer}")
            values = insert_call(gm, join_candidates, value, site.value.new, name=f"tgvkv_values_{layer}")
        outputs[site.key.output], outputs[site.value.output] = keys, values
        joined = (
            KVAppend(keys, key, site.key.new, site.key.output),
            KVAppend(values, value, site.value.new, site.value.output),
        )
        sites.append(dataclasses.replace(site, key=joined[0], value=joined[1], mask=mask, is_causal=False))
    gm.graph.output_node().args = (tuple(outputs),)
    return dataclasses.replace(plan, sites=tuple(sites)), Candidates(new, tuple(roles), history, keep_rate, ())


def _insert_survivors(gm: GraphModule, layer: int, survivors: Survivors) -> tuple[Node, Node, Node]:
    """The inputs' nodes, in the order of `Survivors`."""
    key, value, positions = zip(Survivors._fields, survivors, strict=True)
    return _input(gm, layer, *key), _input(gm, layer, *value), _input(gm, layer, *positions)


def _input(gm: GraphModule, layer: int, name: str, value: Tensor) -> Node:
    return insert_placeholder(gm, f"tgvkv_{name}_{layer}", value)
