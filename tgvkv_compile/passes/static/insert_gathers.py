"""Insert gathers: vision features find their tokens by a prefix sum, not by a mask whose True values are counted."""

from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.targets import argument, op_kind
from tgvkv_compile.ops.static.merging import add_features, merge_features
from tgvkv_compile.passes.rewrite import Rewrite


def insert_gathers(rewrite: Rewrite) -> None:
    """Replaces every merge and every addition of vision features.

    Before::

        %merged : [B, N, hidden] = masked_scatter(%embeds, %mask, %features)
        %picked : [u, hidden]    = index(%hidden, [%mask])
        %node   : [B, N, hidden] = index_put(%hidden, [%mask], add(%picked, %deep_features))

    After::

        %merged : [B, N, hidden] = merge_features(%embeds, %mask, %features)
        %node   : [B, N, hidden] = add_features(%hidden, %mask, %deep_features)

    Requires: a prefill plan. Ensures: no length depends on data. A merge written as a `where` is left as it is.
    """
    gm, plan = rewrite.gm, rewrite.plan
    assert plan.modality is not None
    for number, merge in enumerate(plan.modality.merges):
        if op_kind(merge) != "masked_scatter":
            continue
        embeds, mask, features = (argument(merge, place, name) for place, name in enumerate(("self", "mask", "source")))
        with gm.graph.inserting_before(merge):
            merged = insert_call(gm, merge_features, embeds, mask, features, name=f"tgvkv_merged_{number}")
        merge.replace_all_uses_with(merged)
    for number, addition in enumerate(plan.additions):
        with gm.graph.inserting_before(addition.node):
            added = insert_call(
                gm, add_features, addition.hidden, addition.mask, addition.features, name=f"tgvkv_added_{number}"
            )
        addition.node.replace_all_uses_with(added)
