"""Insert decode: attention of one token over the compact cache, eviction included."""

from typing import Any

from torch.fx import GraphModule

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.meta import BEGINS
from tgvkv_compile.ops.decode_step import decode_step
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.ops.tensor_parallel import tensor_parallel_decode_step
from tgvkv_compile.passes.cached import close, insert_state
from tgvkv_compile.plan import Plan


def insert_decode(gm: GraphModule, plan: Plan, config: EvictionConfig, state: CompactState) -> None:
    """Replaces append and attention of every layer by one operation on the compact cache.

    Before::

        %keys_l   : [B, Hkv, S+1, D] = cat([%past_keys_l, %k_l], dim=-2)
        %values_l : [B, Hkv, S+1, D] = cat([%past_values_l, %v_l], dim=-2)
        %out_l    : [B, H, 1, D]     = scaled_dot_product_attention(%q_l, %keys_l, %values_l, ...)
        return (%keys_0, %values_0, ..., %logits)

    After::

        %tgvkv_key_arena ... : the nine tensors of CompactState = placeholders, updated in place
        %tgvkv_out_l : [B, H, 1, D] = decode_step(%q_l, %k_l, %v_l, <CompactState>, layer=l, ...)
        %tgvkv_lengths_next : i64[B] = advance_lengths(%tgvkv_lengths, None, %k_0)
        return (None, None, ..., %logits, %tgvkv_lengths_next)

    Where heads are split over ranks it is `tensor_parallel_decode_step(..., group=...)`, which averages the step's attention
    over the ranks before it chooses, by one functional all-reduce per layer.

    Requires: a decode plan. Ensures: no past is an input any more, no KV an output.

    Args:
        gm: The graph.
        plan: Its plan.
        config: The eviction options.
        state: Fake values of the new inputs.
    """
    nodes = insert_state(gm, state)
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
                nodes,
                name=f"tgvkv_out_{layer}",
                layer=layer,
                scale=site.scale,
                decode=config.decode,
                sink_tokens=config.sink_tokens,
                **split,
            )
        out.meta[BEGINS] = True
        site.node.replace_all_uses_with(out)
    close(gm, plan, nodes, None)
