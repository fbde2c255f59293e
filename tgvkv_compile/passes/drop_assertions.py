"""Drop assertions: what `torch.export` checks at run time goes; engines have no place for it."""

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def drop_assertions(gm: GraphModule) -> int:
    """Removes assertions, and what is computed for them alone.

    Before::

        %count : i64[]  = sum(%mask)
        %all   : b8[]   = eq(%count, 4096)
        _assert_scalar(item(%all), "...")

    After: nothing of it.

    What they assert (as many vision tokens as features) is checked by whoever runs the engine, before it runs.

    Returns:
        How many assertions there were.
    """
    found: list[Node] = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _ASSERTIONS]
    for node in found:
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()  # not `remove_dead`: what is written in place has no user yet
    return len(found)
