"""Insert decode: attention of one token over the compact cache, eviction included."""

from typing import Any

from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.meta import BEGINS
from tgvkv_compile.ops.cache.decode_step import decode_step
from tgvkv_compile.ops.cache.tensor_parallel import tensor_parallel_decode_step
from tgvkv_compile.passes.cached import close, held_as, insert_state
from tgvkv_compile.passes.rewrite import Rewrite


def insert_decode(rewrite: Rewrite) -> None:
    """Replaces append and attention of every layer by one operation on the compact cache.

    Before::

        %keys_l   : [B, Hkv, S+1, D] = cat([%past_keys_l, %k_l], dim=-2)
        %values_l : [B, Hkv, S+1, D] = cat([%past_values_l, %v_l], dim=-2)
        %out_l    : [B, H, 1, D]     = scaled_dot_product_attention(%q_l, %keys_l, %values_l, ...)
        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_key_arena ... : the tensors of CompactState = placeholders, updated in place
        %tgvkv_out_l : [B, H, 1, D] = decode_step(%q_l, %k_l, %v_l, <CompactState>, layer=l, ...)
        %tgvkv_lengths_next : i64[B] = advance_lengths(%tgvkv_lengths, None, %k_0)
        return (None, None, ..., %logits, %tgvkv_lengths_next)

    Where heads are split over ranks it is `tensor_parallel_decode_step(..., group=...)`, which averages the step's attention
    over the ranks before it chooses, by one functional all-reduce per layer.

    Requires: a decode plan. Ensures: no past is an input any more, no KV an output.
    """
    gm, plan, state = rewrite.gm, rewrite.plan, insert_state(rewrite)
    function: Any = decode_step
    split: dict[str, str] = {}
    if plan.tensor_parallel is not None:
        function, split = tensor_parallel_decode_step, {"group": plan.tensor_parallel.group}
    for layer, site in enumerate(plan.sites):
        with gm.graph.inserting_before(site.node):
            out = insert_call(
                gm,
                function,
                site.query,
                site.key.new,
                site.value.new,
                state,
                name=f"tgvkv_out_{layer}",
                layer=layer,
                scale=site.scale,
                decode=rewrite.config.decode,
                sink_tokens=rewrite.config.sink_tokens,
                **split,
                **held_as(rewrite.config),
            )
        out.meta[BEGINS] = True
        site.node.replace_all_uses_with(out)
    close(gm, plan, state, None)
