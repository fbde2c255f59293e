"""Insert a vision input: the graph is told which of the embeddings that it is handed are vision."""

from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from tgvkv_compile.fx.insert import insert_placeholder
from tgvkv_compile.fx.meta import VISION_OF, fake_tensor


def insert_vision_input(gm: GraphModule, places: Sequence[int]) -> None:
    """Gives the graph a mask for each of its inputs that hold merged embeddings; `find_modality` finds it.

    Before::

        %embeds : f32[B, N, hidden] = placeholder                 # vision was merged in another graph

    After::

        %embeds : f32[B, N, hidden] = placeholder
        %tgvkv_vision_of_embeds : b8[B, N, 1] = placeholder       # the last input

    Args:
        gm: A graph from dynamo.
        places: Of those inputs, among the graph's.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    for place in places:
        embeds = fake_tensor(inputs[place])
        value = embeds.new_empty((*embeds.shape[:2], 1), dtype=torch.bool)
        mask = insert_placeholder(gm, f"tgvkv_vision_of_{inputs[place].name}", value)
        mask.meta[VISION_OF] = inputs[place].name
    gm.recompile()
