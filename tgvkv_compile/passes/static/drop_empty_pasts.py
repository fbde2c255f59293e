"""Drop empty pasts: what a first call puts behind nothing is the new entries themselves."""

import dataclasses

from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.plan import KVAppend


def drop_empty_pasts(rewrite: Rewrite) -> None:
    """Takes the new entries in place of their append to the empty cache; engines join no tensors of different ranks.

    Before::

        %past_l : f32[0]              = lift_fresh_copy(%constant)
        %keys_l : [B, Hkv, N, D]      = cat([%past_l, %k_l], -2)

    After: every use of `%keys_l` is one of `%k_l`.

    Requires: a prefill plan. Ensures: no append has a node of its own.
    """

    def drop(append: KVAppend) -> KVAppend:
        append.node.replace_all_uses_with(append.new)
        return dataclasses.replace(append, node=append.new)

    sites = [dataclasses.replace(site, key=drop(site.key), value=drop(site.value)) for site in rewrite.plan.sites]
    rewrite.plan = dataclasses.replace(rewrite.plan, sites=tuple(sites))
