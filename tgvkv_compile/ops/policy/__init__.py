"""Methods of eviction, one file each: how the tokens of a prompt rank.

A method is a function of a [`Layer`][tgvkv_compile.ops.policy.layer.Layer], traced into the graph.
"""
