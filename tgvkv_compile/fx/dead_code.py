"""Dead code elimination that knows which of dynamo's calls are made for their effect."""

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_value

_EFFECT = "tgvkv_effect"
_VALUES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


def pin_effects(gm: GraphModule) -> None:
    """Marks the calls without users that are made for their effect, as the graph comes from dynamo.

    These are in-place methods and functions that give no tensor: assertions, entering and leaving `vmap` (`torch.fx` does
    not know all of them). A length or a tensor that nobody uses is only dead.
    """
    for node in gm.graph.nodes:
        if node.users or node.op not in ("call_function", "call_method"):
            continue
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        silent = node.op == "call_function" and not isinstance(fake_value(node), _VALUES)
        if in_place or silent or node.is_impure():
            pin(node)


def pin(node: Node) -> None:
    """Marks a call that is made for its effect."""
    node.meta[_EFFECT] = True


def remove_dead(gm: GraphModule, pending: Collection[Node] = ()) -> None:
    """Removes nodes that nobody uses, but for pinned ones and those in `pending`."""
    gm.graph.eliminate_dead_code(lambda node: node in pending or _EFFECT in node.meta or node.op in ("placeholder", "output"))
