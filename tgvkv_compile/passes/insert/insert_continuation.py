"""Insert continuation: a later turn's tokens join the compact cache and attend over it."""

from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.meta import BEGINS
from tgvkv_compile.ops.cache.continue_step import continue_step
from tgvkv_compile.passes.cached import close, held_as, insert_state
from tgvkv_compile.passes.rewrite import Rewrite


def insert_continuation(rewrite: Rewrite) -> None:
    """Replaces append and attention of every layer of a later turn (several queries); nothing is evicted.

    Before: as `insert_decode`, with Q queries and a mask over the logical sequence.

    After::

        %tgvkv_out_l : [B, H, Q, D] = continue_step(%q_l, %k_l, %v_l, %mask, <CompactState>, layer=l, ...)
        %tgvkv_lengths_next : i64[B] = advance_lengths(%tgvkv_lengths, %mask, %k_0)
        return (None, None, ..., %logits, %tgvkv_lengths_next)

    Requires: a continuation plan. Ensures: as `insert_decode`.
    """
    gm, plan, state = rewrite.gm, rewrite.plan, insert_state(rewrite)
    for layer, site in enumerate(plan.sites):
        new = (site.query, site.key.new, site.value.new, site.mask)
        with gm.graph.inserting_before(site.node):
            options = {"layer": layer, "scale": site.scale, **held_as(rewrite.config)}
            out = insert_call(gm, continue_step, *new, state, name=f"tgvkv_out_{layer}", **options)
        out.meta[BEGINS] = True
        site.node.replace_all_uses_with(out)
    close(gm, plan, state, plan.sites[0].mask)
