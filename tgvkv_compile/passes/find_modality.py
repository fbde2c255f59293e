"""Find the modality mask: which positions of the prompt are vision placeholders."""

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import VISION_OF, fake_value, is_tensor
from tgvkv_compile.fx.targets import argument, op_kind
from tgvkv_compile.plan import ModalityMask


def find_modality(gm: GraphModule) -> ModalityMask | None:
    """Finds the masks of the `masked_scatter`s that merge vision features into token embeddings.

    The mask may be computed in the graph or be one of its inputs (dynamo broke the graph before it)::

        %mask   : b8[B, N, 1]        = (%input_ids == IMAGE_TOKEN_ID).unsqueeze(-1)     # or a placeholder
        %merged : f32[B, N, hidden]  = %embeds.masked_scatter(%mask, %features)

    Embeddings that other graphs merged vision into come with their mask (`insert_vision_input`).

    Returns:
        The masks of all merges (images, video), or None where nothing is merged.
    """
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    masks = [node for node in inputs.values() if VISION_OF in node.meta]
    merges = [inputs[mask.meta[VISION_OF]] for mask in masks]
    own = [node for node in gm.graph.nodes if op_kind(node) == "masked_scatter" and _is_merge(node)]
    if not masks and not own:
        return None
    masks += [argument(node, 1, "mask") for node in own]
    return ModalityMask(tuple(masks), (*merges, *own))


def _is_merge(node: Node) -> bool:
    embeds, mask = argument(node, 0, "input"), argument(node, 1, "mask")
    if not is_tensor(embeds) or not is_tensor(mask):
        return False
    value, selected = fake_value(embeds), fake_value(mask)
    return bool(value.ndim == 3 and selected.ndim == 3 and selected.dtype == torch.bool)
