"""The check that runs after every pass: a graph that fails it is a bug of the pass, named in the error."""

from collections.abc import Collection

from torch.fx import GraphModule, Node

from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.dead_code import remove_dead
from tgvkv_compile.fx.meta import fake_value


def verify(gm: GraphModule, *, after: str, pending: Collection[Node] = ()) -> None:
    """Removes dead code, lints, recompiles, and checks that every call carries metadata.

    Calls that return nothing (assertions, logging) carry none and are left out.

    Args:
        gm: The graph.
        after: Name of the pass that ran last.
        pending: Nodes without a user yet, which a later pass is going to use.

    Raises:
        InternalError: The graph is malformed; the message names the pass `after`.
    """
    remove_dead(gm, pending)
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise InternalError(f"pass {after!r} left a malformed graph: {str(error).splitlines()[0]}") from error
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and (node.users or node in pending) and fake_value(node) is None:
            raise InternalError(f"pass {after!r} left %{node.name} without metadata")
    gm.recompile()
