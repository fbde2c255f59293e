"""Materialise masks: flex attention's mask function becomes the mask tensor that the other forms have."""

import dataclasses
from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.fx.meta import fake_tensor, fake_value, same_size, submodule
from tgvkv_compile.fx.targets import argument
from tgvkv_compile.ops.attention.masks import mask_of_function
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.plan import AttentionSite


def materialise_masks(rewrite: Rewrite) -> None:
    """Evaluates the mask function of every `flex_attention` on all indices; layers with the same function share the mask.

    Before::

        %mask_mod : get_attr                                   # (b, h, q, kv, *captured) -> bool
        %out      : [B, H, Q, D] = flex_attention(%q, %keys, %values, ..., (..., %mask_mod), ..., captured)[0]

    After::

        %tgvkv_flex_mask_l : b8[B|1, 1, Q, S] = mask_of_function(%mask_mod, captured, %q, S, per_sample=...)
        %out          : as before; it dies when a later pass replaces it

    Requires: a prefill or continuation plan (a decode step attends to all that is kept, and needs no mask). Ensures: no
    site has a mask function; sites of other forms are as they were.
    """
    made: dict[Any, Node] = {}
    sites = tuple(_materialise(rewrite.gm, site, layer, made) for layer, site in enumerate(rewrite.plan.sites))
    rewrite.plan = dataclasses.replace(rewrite.plan, sites=sites)


def _length(site: AttentionSite) -> Any:
    """S as the block mask has it, an int or a node; what is behind a handle must not be asked for it."""
    call = site.node.args[0]
    assert isinstance(call, Node)
    length = argument(call, 4, "block_mask")[1]
    value = fake_value(length) if isinstance(length, Node) else length
    keys = fake_tensor(site.key.node).shape[2]
    if not same_size(value, keys):
        raise InternalError(f"%{call.name} has a block mask of {value} keys, and {keys} keys")
    return length


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
                _length(site),
                name=f"tgvkv_flex_mask_{layer}",
                per_sample=bool(batch.users),
            )
    return dataclasses.replace(site, mask=made[key], mask_function=None)
