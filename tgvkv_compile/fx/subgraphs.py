"""Graphs inside of a graph: what a higher-order operator is called with, such as a checkpointed layer or a branch."""

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import attribute


def bodies(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Each call in `gm` that is handed a graph, with that graph; not what is nested in it."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        for given in node.all_input_nodes:
            body = attribute(given) if given.op == "get_attr" else None
            if isinstance(body, GraphModule):
                yield node, body


def all_nodes(gm: GraphModule) -> Iterator[Node]:
    """The nodes of a graph and of all graphs inside of it."""
    yield from gm.graph.nodes
    for _, body in bodies(gm):
        yield from all_nodes(body)
