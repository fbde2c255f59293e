"""Insert the whole past: the first later turn with vision on a cache that holds text, all of it uncompressed."""

from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.ops.cache.later_turns import WholePast, whole_past, whole_rate
from tgvkv_compile.passes.insert.insert_survivors import Held, insert_candidates
from tgvkv_compile.passes.rewrite import Rewrite


def insert_whole_past(rewrite: Rewrite) -> None:
    """Gives every layer its candidates: all that the cache holds, and the new tokens.

    Before::

        %keys_l : [B, Hkv, S+Q, D] = cat([%past_keys_l, %k_l], dim=-2)                # the past is real
        %out_l  : [B, H, Q, D]     = scaled_dot_product_attention(%q_l, %keys_l, %values_l, %mask)
        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_past      : WholePast = whole_past(%mask, %past_keys_0)                     # history, lengths, positions
        %tgvkv_keep_rate : f32[B, L] = whole_rate(%past_keys_0, L)
        ...                                                            # as after `insert_survivors`, with W_l = S

    Requires: a plan of a later turn with new vision on an uncompressed cache. Ensures: what `insert_survivors` does.
    """
    gm, plan = rewrite.gm, rewrite.plan
    held: list[tuple[Node, Node]] = []
    for site in plan.sites:
        assert site.key.past is not None and site.value.past is not None
        held.append((site.key.past, site.value.past))
    first = plan.sites[0]
    with gm.graph.inserting_before(first.node):
        past = insert_call(gm, whole_past, first.mask, held[0][0], name="tgvkv_past")
        history, lengths, positions = (insert_item(gm, past, field, name=f"tgvkv_{field}") for field in WholePast._fields)
        rate = insert_call(gm, whole_rate, held[0][0], plan.num_layers, name="tgvkv_keep_rate")
    insert_candidates(rewrite, history, lengths, rate, [Held(key, value, positions) for key, value in held])
