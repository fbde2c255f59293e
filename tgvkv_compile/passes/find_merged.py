"""Find merged embeddings: which outputs of a graph hold the vision that the graph merged."""

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_tensor, is_tensor, output_nodes, same_size
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.plan import ModalityMask


def find_merged(gm: GraphModule, modality: ModalityMask) -> tuple[int, ...]:
    """Finds the outputs that are computed from a merge and are embeddings still.

    Here it is output 1::

        %merged : f32[B, N, hidden]  = %embeds.masked_scatter(%mask, %features)
        return (%other, %merged)

    Returns:
        The places of the outputs, floating-point `[B, N, hidden]`.
    """
    like = fake_tensor(modality.merges[0])
    merged = _computed_from(gm, modality)
    return tuple(
        place
        for place, node in enumerate(output_nodes(gm))
        if node in merged
        and is_tensor(node)
        and (value := fake_tensor(node)).ndim == 3
        and value.is_floating_point()
        and all(same_size(value.shape[dim], like.shape[dim]) for dim in range(2))
    )


def attends_to_merged(gm: GraphModule, modality: ModalityMask) -> bool:
    """Whether the graph holds attention over merged embeddings: a decoder's, not a vision tower's."""
    return any(op_kind(node) in ("sdpa", "flex_attention", "softmax") for node in _computed_from(gm, modality))


def _computed_from(gm: GraphModule, modality: ModalityMask) -> set[Node]:
    merged: set[Node] = set(modality.merges)
    for node in gm.graph.nodes:
        if not merged.isdisjoint(node.all_input_nodes):
            merged.add(node)
    return merged
