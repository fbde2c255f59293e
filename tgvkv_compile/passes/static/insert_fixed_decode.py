"""Insert fixed decode: one token over every layer's own slots, eviction included, for exported graphs."""

from typing import Any

from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_item, insert_placeholder
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.cache.continue_step import advance_lengths
from tgvkv_compile.ops.cache.packing import by_layer
from tgvkv_compile.ops.static.decode import LayerState, stack_layers, static_decode_step
from tgvkv_compile.ops.static.selection import PackedLayer
from tgvkv_compile.passes.cached import drop_pasts, past_inputs
from tgvkv_compile.passes.rewrite import Rewrite, StaticDecode


def insert_fixed_decode(rewrite: Rewrite) -> None:
    """Replaces append and attention of every layer by one step on its slots.

    Before::

        %keys_l   : [B, Hkv, S+1, D] = cat([%past_key_l, %k_l], dim=-2)
        %values_l : [B, Hkv, S+1, D] = cat([%past_value_l, %v_l], dim=-2)
        %out_l    : [B, H, 1, D]     = scaled_dot_product_attention(%q_l, %keys_l, %values_l, ...)
        return (%logits, %keys_0, %values_0, ...)

    After::

        %key_l, %value_l, %slot_position_l, ..., %protect_from, %keep_rate, %lengths = placeholders
        %tgvkv_step_l : Stepped      = static_decode_step(%q_l, %k_l, %v_l, <LayerState>, ...)
        %out_l        : [B, H, 1, D] = %tgvkv_step_l.output
        return (%logits, key_0, value_0, slot_position_0, ..., protect_from, advance_lengths(%lengths))

    Requires: a decode plan of a graph whose first output is the logits. Ensures: no past of another length is an input any
    more; nothing that comes in is written to.
    """
    gm, plan, config = rewrite.gm, rewrite.plan, rewrite.config
    logits = output_nodes(gm)[0]
    inputs = {name: insert_placeholder(gm, name, value) for name, value in rewrite.get(StaticDecode).state.items()}
    protect, rate, lengths = inputs["protect_from"], inputs["keep_rate"], inputs["lengths"]
    returned: list[Node] = [logits]
    protected = []
    with gm.graph.inserting_before(plan.sites[0].node):
        columns = [(value, insert_call(gm, by_layer, value, name=f"tgvkv_{value.name}_columns")) for value in (protect, rate)]
    for layer, site in enumerate(plan.sites):
        with gm.graph.inserting_before(site.node):
            own: list[Any] = [inputs[f"{part}_{layer}"] for part in PackedLayer._fields]
            own += [insert_item(gm, column, layer, name=f"tgvkv_{value.name}_{layer}") for value, column in columns]
            state = LayerState(*(*own, lengths))
            new = (site.query, site.key.new, site.value.new)
            options = (site.scale, config.decode, config.sink_tokens)
            step = insert_call(gm, static_decode_step, *new, state, *options, name=f"tgvkv_step_{layer}")
            out = insert_item(gm, step, "output", name=f"tgvkv_output_{layer}")
            returned += [insert_item(gm, step, part, name=f"tgvkv_next_{part}_{layer}") for part in PackedLayer._fields]
            protected.append(insert_item(gm, step, "protect_from", name=f"tgvkv_next_protect_from_{layer}"))
        site.node.replace_all_uses_with(out)
    with gm.graph.inserting_before(gm.graph.output_node()):
        following = insert_call(gm, stack_layers, tuple(protected), name="tgvkv_next_protect_from")
        token = plan.sites[0].key.new
        advanced = insert_call(gm, advance_lengths, lengths, None, token, name="tgvkv_next_lengths")
    gm.graph.output_node().args = ((*returned, following, advanced),)
    drop_pasts(gm, past_inputs(plan))
