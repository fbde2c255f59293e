"""Find the KV appends that no pass can reach: those in the body of a higher-order operator."""

from collections.abc import Collection

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import output_nodes, source_line
from tgvkv_compile.fx.subgraphs import bodies
from tgvkv_compile.fx.targets import op_kind, target_name
from tgvkv_compile.passes.find.find_appends import find_appends
from tgvkv_compile.plan import Miss


def find_enclosed(gm: GraphModule) -> tuple[Miss, ...]:
    """Finds the KV appends in bodies of higher-order operators, such as a checkpointed layer, whose result the graph returns.

    Before (nothing is changed)::

        %layer  : GraphModule         = get_attr                       # holds: return cat([%past, %new], dim=-2)
        %called                       = tag_activation_checkpoint(%layer, ...)
        %joined : f32[B, Hkv, S+Q, D] = getitem(%called, 0)
        return (..., %joined, ...)

    Returns:
        A miss for each; attention in a body whose keys the graph does not return has no cache, and is none.
    """
    return tuple(_search(gm, {node for node in output_nodes(gm) if isinstance(node, Node)}))


def _search(gm: GraphModule, outputs: Collection[Node]) -> list[Miss]:
    found: list[Miss] = []
    for call, body in bodies(gm):
        results = output_nodes(body)
        picked = {user.args[1] for user in call.users if op_kind(user) == "getitem" and user in outputs}
        returned = {
            node for index, node in enumerate(results) if isinstance(node, Node) and (call in outputs or index in picked)
        }
        if not returned:
            continue
        appends, misses = find_appends(body)
        found += [_miss(append.node, call) for append in appends if append.node in returned]
        found += [*misses, *_search(body, returned)]
    return found


def _miss(node: Node, call: Node) -> Miss:
    reason = (
        f"this KV append stands in the body of %{call.name} ({target_name(call)}: a checkpointed layer, or one that is "
        "compiled apart), where no layer can be rewritten; turn gradient checkpointing off "
        "(model.gradient_checkpointing_disable()), or pass use_cache=False, which runs without a cache and evicts nothing"
    )
    return Miss(node.name, target_name(node), reason, source_line(node))
