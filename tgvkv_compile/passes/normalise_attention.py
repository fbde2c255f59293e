"""Normalise: every attention of a prefill becomes one fused operation that also gives the log-sum-exp of its rows."""

import dataclasses

from torch.fx import GraphModule

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.fx.meta import BEGINS, fake_value
from tgvkv_compile.ops.attention.sdpa import scaled_dot_product_attention_with_lse
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.plan import AttentionSite


def normalise_attention(rewrite: Rewrite) -> None:
    """Puts one call in the place of each form; the eager one would hold `[B, H, N, N]`.

    Before, one of::

        %out : [B, H, N, D] = scaled_dot_product_attention(%q, [repeat_kv](%keys), [repeat_kv](%values), %mask, ...)
        %out : [B, H, N, D] = matmul(softmax(matmul(%q, repeat_kv(%keys)^T) * scale + %mask), repeat_kv(%values))

    After::

        %both : AttentionWithLse       = scaled_dot_product_attention_with_lse(%q, %keys, %values, %mask, is_causal, scale)
        %out  : [B, H, N, D]           = %both.output
        %lse  : f32[B, H, N]           = %both.lse              # only where the kernel gives it

    Requires: a prefill plan. Ensures: every site has form `"sdpa"`; no node holds attention probabilities.
    """
    sites = tuple(_fuse(rewrite.gm, site, layer) for layer, site in enumerate(rewrite.plan.sites))
    rewrite.plan = dataclasses.replace(rewrite.plan, sites=sites)


def _fuse(gm: GraphModule, site: AttentionSite, layer: int) -> AttentionSite:
    lse = None
    with gm.graph.inserting_before(site.node):
        both = insert_call(
            gm,
            scaled_dot_product_attention_with_lse,
            site.query,
            site.key.node,
            site.value.node,
            site.mask,
            site.is_causal,
            site.scale,
            name=f"tgvkv_attention_{layer}",
        )
        out = insert_item(gm, both, "output", name=f"tgvkv_output_{layer}")
        if fake_value(both).lse is not None:
            lse = insert_item(gm, both, "lse", name=f"tgvkv_lse_{layer}")
    both.meta[BEGINS] = True
    for node in (both, out):
        for key in ("stack_trace", "nn_module_stack"):
            node.meta[key] = site.node.meta.get(key)
    site.node.replace_all_uses_with(out)
    return dataclasses.replace(site, node=out, form="sdpa", lse=lse)
