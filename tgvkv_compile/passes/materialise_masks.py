"""Materialise masks: flex attention's mask function becomes the mask tensor that the other forms have."""

import dataclasses
from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.meta import submodule
from tgvkv_compile.ops.graph_masks import mask_of_function
from tgvkv_compile.plan import AttentionSite, Plan


def materialise_masks(gm: GraphModule, plan: Plan) -> Plan:
    """Evaluates the mask function of every `flex_attention` on all indices; layers with the same function share the mask.

    Before::

        %mask_mod : get_attr                                   # (b, h, q, kv, *captured) -> bool
        %out      : [B, H, Q, D] = flex_attention(%q, %keys, %values, ..., (..., %mask_mod), ..., captured)[0]

    After::

        %tgvkv_mask_l : b8[B|1, 1, Q, S] = mask_of_function(%mask_mod, captured, %q, %keys, per_sample=...)
        %out          : as before; it dies when a later pass replaces it

    Requires: a prefill or continuation plan (a decode step attends to all that is kept, and needs no mask). Ensures: no
    site has a mask function; sites of other forms are as they were.

    Returns:
        The plan with the new sites.
    """
    made: dict[Any, Node] = {}
    sites = tuple(_materialise(gm, site, layer, made) for layer, site in enumerate(plan.sites))
    return dataclasses.replace(plan, sites=sites)


def _materialise(gm: GraphModule, site: AttentionSite, layer: int, made: dict[Any, Node]) -> AttentionSite:
    if site.mask_function is None:
        return site
    function, captured = site.mask_function.function, site.mask_function.captured
    graph = submodule(function)
    own = [node for node in graph.graph.nodes if node.op == "get_attr"]  # tensors of its own: the code does not tell it all
    key = (graph.code, captured) if not own else function
    if key not in made:
        batch, *_ = graph.graph.find_nodes(op="placeholder")
        with gm.graph.inserting_before(site.node):
            made[key] = insert_call(
                gm,
                mask_of_function,
                function,
                captured,
                site.query,
                site.key.node,
                name=f"tgvkv_mask_{layer}",
                per_sample=bool(batch.users),
            )
    return dataclasses.replace(site, mask=made[key], mask_function=None)
