"""Extract: the few nodes that tell, before a prefill runs, how many vision tokens each sample has."""

from torch.fx import Node

from tgvkv_compile.fx.dead_code import remove_dead
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.ops.graph_masks import valid_columns, vision_positions
from tgvkv_compile.ops.packing import count_vision
from tgvkv_compile.ops.roles import token_roles
from tgvkv_compile.passes.rewrite import Rewrite


def extract_vision_count(rewrite: Rewrite) -> None:
    """Leaves of a prefill what counts its vision tokens, and nothing else.

    With `budget_of="vision"` all text is kept, so the arena's size depends on how much of the prompt is vision.

    Before::

        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_count : i64[B] = count_vision(token_roles(vision_positions((%mask,)), %valid))
        return (%tgvkv_count,)                                  # all else is dead and gone

    Requires: a prefill plan; `materialise_masks` ran. Ensures: the graph takes the inputs that the prefill does.
    """
    gm, plan = rewrite.gm, rewrite.plan
    assert plan.modality is not None
    first, masks = plan.sites[0], tuple(plan.modality.masks)
    with gm.graph.inserting_before(gm.graph.output_node()):
        vision = insert_call(gm, vision_positions, masks, name="tgvkv_vision")
        valid: Node | None = None
        if first.mask is not None:
            valid = insert_call(gm, valid_columns, first.mask, masks[0], name="tgvkv_valid")
        roles = insert_call(gm, token_roles, vision, valid, name="tgvkv_roles")
        count = insert_call(gm, count_vision, roles, name="tgvkv_count", **rewrite.config.constants())
    gm.graph.output_node().args = ((count,),)
    remove_dead(gm)
