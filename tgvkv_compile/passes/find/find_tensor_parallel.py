"""Find tensor parallelism: the process group that attention's heads are split over."""

from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_value, is_tensor, partial_over, source_line
from tgvkv_compile.fx.targets import argument, collective, op_kind, target_name
from tgvkv_compile.plan import AttentionSite, Miss, TensorParallel

_PASSING = frozenset(
    {"getitem", "expand", "reshape", "unsqueeze", "contiguous", "to", "transpose", "permute", "mul", "flatten"}
    | {"from_local", "to_local"}
)
_PROJECTIONS = frozenset({"linear", "matmul", "addmm"})


def find_tensor_parallel(gm: GraphModule, sites: tuple[AttentionSite, ...]) -> tuple[TensorParallel | None, tuple[Miss, ...]]:
    """Finds the sum over ranks that follows the output projection of an attention whose heads are split.

    Forms (nothing is changed; between attention and projection there may be views, casts and a gate)::

        %projected : [B, Q, hidden] = linear(%out, %weight)
        %summed    : [B, Q, hidden] = _c10d_functional.all_reduce(%projected, "sum", group)

        %projected : DTensor[B, Q, hidden] = from_local(linear(%out, %weight), mesh, [Partial()])   # or linear of DTensors
        %summed    : DTensor[B, Q, hidden] = %projected.redistribute([Replicate()])

    A model whose attention is whole on every rank (only its MLPs are split, say) has no such sum and needs nothing.

    Returns:
        The group, or None where no attention is split; and a miss for each site that is split in a way not known here:
        another collective in that place, a query weight that is a shard although nothing sums, attention over `DTensor`s,
        a mask per head, a group that differs from the first site's.
    """
    groups: list[str | None] = []
    misses: list[Miss] = []
    for site in sites:
        found = _group_of(site)
        if isinstance(found, Miss):
            misses.append(found)
            continue
        groups.append(found)
        if found != groups[0]:
            reason = f"heads are split over process group {found!r} here and {groups[0]!r} in the first layer"
            misses.append(_miss(site.node, reason + "; shard all layers alike"))
        elif found is not None and site.mask is not None and fake_value(site.mask).shape[1] != 1:
            misses.append(_miss(site.mask, "a mask per head on heads that are split over ranks; give one mask for all heads"))
    if misses or not groups or groups[0] is None:
        return None, tuple(misses)
    return TensorParallel(groups[0]), ()


def _miss(node: Node, reason: str) -> Miss:
    return Miss(node.name, target_name(node), reason, source_line(node))


def _group_of(site: AttentionSite) -> str | Miss | None:
    for value in (site.query, site.key.node):
        if hasattr(fake_value(value), "placements"):
            return _miss(value, "attention over DTensors; shard with transformers' tp_plan, whose attention sees local heads")
    for user in _through(site.node):
        # One operation that is not a view may come between: the projection, plain or quantised.
        for node in (user, *(_through(user) if op_kind(user) not in _PASSING else ())):
            group = partial_over(fake_value(node))
            if collective(node) is not None:
                return _sum_over(node)
            if group is not None:
                return group
    weight = _query_shard(site.query)
    if weight is not None:
        return _miss(
            site.node,
            f"the query heads are split over ranks (%{weight.name} is a shard), but no all-reduce was found after the output "
            "projection; shard it row-wise ('rowwise' in transformers' tp_plan)",
        )
    return None


def _through(node: Node) -> list[Node]:
    """The users of a node, and the users of those among them that pass its elements on, and so forth."""
    found: list[Node] = []
    for user in node.users:
        found.append(user)
        if op_kind(user) in _PASSING:
            found += _through(user)
    return found


def _sum_over(node: Node) -> str | Miss:
    """The group of a collective that is the sum over ranks."""
    operation, group = argument(node, 1, "reduce_op"), argument(node, 2, "group_name")
    if collective(node) not in ("all_reduce", "all_reduce_") or operation != "sum" or not isinstance(group, str):
        return _miss(node, "an all_reduce('sum') over a named group was expected here; heads are split in another way")
    return group


def _query_shard(query: Node) -> Node | None:
    """The weight that makes the queries, if each rank holds a shard of it (a `DTensor`)."""
    frontier, seen = [query], {query}
    while frontier:
        node = frontier.pop()
        if op_kind(node) in _PROJECTIONS:
            weights = [_local_of(part) for part in node.all_input_nodes]
            return next((weight for weight in weights if weight is not None), None)
        new = [parent for parent in node.all_input_nodes if parent not in seen and is_tensor(parent)]
        frontier += new
        seen.update(new)
    return None


def _local_of(node: Any) -> Node | None:
    """The placeholder of a sharded `DTensor` that `node` is, or is the local part of."""
    while isinstance(node, Node) and node.op != "placeholder":
        source = node.args[0] if node.args else None
        # torch 2.11 writes `to_local` as a function of its own making, so it is known by what goes in.
        from_dtensor = isinstance(source, Node) and hasattr(fake_value(source), "placements")
        if op_kind(node) not in _PASSING and not from_dtensor:
            return None
        node = source
    placements = getattr(fake_value(node), "placements", ()) if isinstance(node, Node) else ()
    return node if any(not placement.is_replicate() for placement in placements) else None
