"""Find the KV appends: where a layer's new keys or values join the cache."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_value, is_tensor, output_nodes, source_line
from tgvkv_compile.fx.targets import argument, op_kind, target_name
from tgvkv_compile.plan import KVAppend, Miss


def find_appends(gm: GraphModule) -> tuple[tuple[KVAppend, ...], tuple[Miss, ...]]:
    """Finds every `cat` of exactly (past, new) on the sequence dimension whose result the graph returns.

    Before (nothing is changed)::

        %past   : f32[B, Hkv, S, D]   = placeholder                    # or torch.tensor([]) in a first call
        %new    : f32[B, Hkv, Q, D]
        %joined : f32[B, Hkv, S+Q, D] = torch.cat([%past, %new], dim=-2)
        return (..., %joined, ...)

    A `cat` that is not returned as it is (a sliding-window layer returns its tail) is left alone: such a layer's KV is
    bounded already. A cache that writes in place (`index_copy` on an input, as `StaticCache` does) is a miss.

    Returns:
        The appends in graph order, and the misses.
    """
    outputs = {node: position for position, node in reversed(list(enumerate(output_nodes(gm)))) if isinstance(node, Node)}
    appends: list[KVAppend] = []
    misses: list[Miss] = []
    for node in gm.graph.nodes:
        kind = op_kind(node)
        if kind == "cat" and node in outputs and _is_sequence_cat(node):
            past, new = argument(node, 0, "tensors")
            empty = _is_empty(past)
            if empty or past.op == "placeholder":
                appends.append(KVAppend(node, None if empty else past, new, outputs[node]))
        elif kind == "index_copy" and _is_cache(node.args[0]):
            misses.append(
                Miss(
                    node.name,
                    target_name(node),
                    "the cache is written in place (StaticCache); pass cache_implementation='dynamic' or no cache",
                    source_line(node),
                )
            )
    return tuple(appends), tuple(misses)


def _is_sequence_cat(node: Node) -> bool:
    tensors = argument(node, 0, "tensors")
    value = fake_value(node)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or not all(is_tensor(t) for t in tensors):
        return False
    return isinstance(value, torch.Tensor) and value.ndim == 4 and argument(node, 1, "dim", 0) in (-2, 2)


def _is_empty(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.ndim == 1 and value.shape[0] == 0


def _is_cache(node: Any) -> bool:
    """A cache that came in, or one of zeros that a first call makes."""
    if not is_tensor(node) or fake_value(node).ndim != 4:
        return False
    return bool(node.op == "placeholder" or op_kind(node) == "zeros")
