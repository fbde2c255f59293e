"""Extract: the few nodes that tell, before a prefill runs, how many vision tokens each sample has."""

import copy

from torch.fx import GraphModule, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.dead_code import remove_dead
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.ops.graph_masks import valid_columns, vision_positions
from tgvkv_compile.ops.packing import count_vision
from tgvkv_compile.ops.roles import token_roles
from tgvkv_compile.plan import Plan


def extract_vision_count(gm: GraphModule, plan: Plan, config: EvictionConfig) -> GraphModule:
    """Makes a graph of its own; `gm` is not changed.

    With `budget_of="vision"` all text is kept, so the arena's size depends on how much of the prompt is vision.

    Before::

        return (%keys_0, %values_0, ..., %logits)

    After, in the copy::

        %tgvkv_count : i64[B] = count_vision(token_roles(vision_positions((%mask,)), %valid))
        return (%tgvkv_count,)                                  # all else is dead and gone

    Requires: a prefill plan.
    """
    other = copy.deepcopy(gm)
    twin = dict(zip(gm.graph.nodes, other.graph.nodes, strict=True))
    assert plan.modality is not None
    first = plan.sites[0]
    with other.graph.inserting_before(other.graph.output_node()):
        masks = tuple(twin[mask] for mask in plan.modality.masks)
        vision = insert_call(other, vision_positions, masks, name="tgvkv_vision")
        valid: Node | None = None
        if first.mask is not None:
            valid = insert_call(other, valid_columns, twin[first.mask], masks[0], name="tgvkv_valid")
        roles = insert_call(other, token_roles, vision, valid, name="tgvkv_roles")
        count = insert_call(other, count_vision, roles, name="tgvkv_count", **config.constants())
    other.graph.output_node().args = ((count,),)
    remove_dead(other)
    other.recompile()
    return other
