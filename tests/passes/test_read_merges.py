"""What was said of embeddings before the graph becomes metadata of the graph's inputs."""

from typing import Any

import torch
from torch import Tensor, library
from torch.fx import GraphModule

from tgvkv_compile.fx.meta import OF_TOKENS, VISION_OF
from tgvkv_compile.ops.merged import merged
from tgvkv_compile.passes.find.find_modality import find_modality
from tgvkv_compile.pipeline import with_merges_read


def graph_of(vision: Tensor | None) -> GraphModule:
    """As dynamo hands it over."""
    seen: list[GraphModule] = []

    def keep(gm: GraphModule, _: list[Any]) -> Any:
        seen.append(gm)
        return gm.forward

    def decoder(embeds: Tensor, vision: Tensor | None) -> Tensor:
        return merged(embeds, vision) * 2.0

    torch.compile(decoder, backend=keep, fullgraph=True)(torch.randn(1, 4, 8), vision)
    return seen[0]


def test_vision_becomes_the_mask_of_its_embeddings() -> None:
    gm = graph_of(torch.ones(1, 4, 1, dtype=torch.bool))
    other = with_merges_read(gm)
    embeds, vision = other.graph.find_nodes(op="placeholder")
    assert embeds.meta[OF_TOKENS] and vision.meta[VISION_OF] == embeds.name
    assert [node.op for node in other.graph.nodes].count("call_function") == 1  # the product
    modality = find_modality(other)
    assert modality is not None and modality.masks == (vision,) and modality.merges == (embeds,)
    values = torch.randn(1, 4, 8)
    assert torch.equal(other(values, torch.ones(1, 4, 1, dtype=torch.bool))[0], values * 2.0)
    assert any("merged" in str(node.target) for node in gm.graph.nodes)  # what dynamo gave is as it was


def test_text_is_known_to_be_text() -> None:
    other = with_merges_read(graph_of(None))
    (embeds,) = other.graph.find_nodes(op="placeholder")
    assert embeds.meta[OF_TOKENS] and find_modality(other) is None


def test_a_graph_of_which_nothing_was_said_stays() -> None:
    gm = with_merges_read(graph_of(None))
    assert with_merges_read(gm) is gm


def test_opcheck() -> None:
    embeds = torch.randn(1, 4, 8)
    library.opcheck(torch.ops.tgvkv.merged, (embeds, None))
    library.opcheck(torch.ops.tgvkv.merged, (embeds, torch.ones(1, 4, 1, dtype=torch.bool)))
