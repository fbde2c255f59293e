"""Read merges: what was said of the embeddings that the graph is handed becomes metadata of its inputs."""

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import OF_TOKENS, VISION_OF
from tgvkv_compile.fx.targets import argument, op_kind


def read_merges(gm: GraphModule) -> None:
    """Takes the calls of `merged` out of the graph; `find_modality` and `find_embedding` find what they said.

    Before::

        %embeds : f32[B, N, hidden] = placeholder                 # vision was merged before the graph
        %vision : b8[B, N, 1]       = placeholder                 # or None: all of it is text
        %known  : f32[B, N, hidden] = tgvkv.merged(%embeds, %vision)

    After: `%embeds` in the place of `%known`, marked as embeddings of tokens, and `%vision` as the mask of `%embeds`.

    Args:
        gm: A graph from dynamo.
    """
    for node in list(gm.graph.nodes):
        if op_kind(node) != "merged":
            continue
        embeds, vision = argument(node, 0, "embeds"), argument(node, 1, "vision")
        embeds.meta[OF_TOKENS] = True
        if isinstance(vision, Node):
            vision.meta[VISION_OF] = embeds.name
        node.replace_all_uses_with(embeds)
        gm.graph.erase_node(node)
    gm.recompile()
