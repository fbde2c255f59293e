"""Extract: the few nodes that tell, before a prefill runs, how many vision tokens each sample has."""

from tgvkv_compile.fx.dead_code import remove_dead
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.ops.cache.packing import count_vision
from tgvkv_compile.passes.insert.insert_scoring import insert_token_types
from tgvkv_compile.passes.rewrite import Rewrite


def extract_vision_count(rewrite: Rewrite) -> None:
    """Leaves of a prefill what counts its vision tokens, and nothing else.

    With `budget_of="vision"` all text is kept, so the arena's size depends on how much of the prompt is vision.

    Before::

        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_count : i64[B] = count_vision(classify_tokens(vision_positions((%mask,)), %valid))
        return (%tgvkv_count,)                                  # all else is dead and gone

    Requires: a prefill plan; `materialise_masks` ran. Ensures: the graph takes the inputs that the prefill does.
    """
    gm, plan = rewrite.gm, rewrite.plan
    assert plan.modality is not None
    with gm.graph.inserting_before(gm.graph.output_node()):
        token_types, _ = insert_token_types(rewrite, plan.modality.masks[0])
        count = insert_call(gm, count_vision, token_types, name="tgvkv_count", **rewrite.config.constants())
    gm.graph.output_node().args = ((count,),)
    remove_dead(gm)
