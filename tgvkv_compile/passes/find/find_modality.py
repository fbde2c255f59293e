"""Find the modality mask: which positions of the prompt are vision placeholders."""

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import VISION_OF, fake_value, is_tensor
from tgvkv_compile.fx.targets import argument, op_kind
from tgvkv_compile.plan import ModalityMask


def find_modality(gm: GraphModule) -> ModalityMask | None:
    """Finds the masks of the operations that merge vision features into token embeddings.

    Of a `masked_scatter` the mask may be computed in the graph or be one of its inputs (dynamo broke the graph before it).
    A `where` is a merge only if its condition is seen to compare tokens::

        %mask   : b8[B, N, 1]        = (%input_ids == IMAGE_TOKEN_ID).unsqueeze(-1)     # or a placeholder
        %merged : f32[B, N, hidden]  = %embeds.masked_scatter(%mask, %features)
        %merged : f32[B, N, hidden]  = where(%mask, %spread_features, %embeds)

    Embeddings that vision was merged into before the graph come with their mask (`read_merges`).

    Returns:
        The masks of all merges (images, video), or None where nothing is merged.
    """
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    masks = [node for node in inputs.values() if VISION_OF in node.meta]
    merges = [inputs[mask.meta[VISION_OF]] for mask in masks]
    own = [node for node in gm.graph.nodes if _merge_mask(node) is not None]
    if not masks and not own:
        return None
    masks += [mask for node in own if (mask := _merge_mask(node)) is not None]
    return ModalityMask(tuple(masks), (*merges, *own))


def _merge_mask(node: Node) -> Node | None:
    """The mask of a merge, None for every other node."""
    kind = op_kind(node)
    if kind == "masked_scatter":
        embeds, mask = argument(node, 0, "input"), argument(node, 1, "mask")
    elif kind == "where":
        embeds, mask = argument(node, 2, "other"), argument(node, 0, "condition")
    else:
        return None
    if not is_tensor(embeds) or not is_tensor(mask):
        return None
    value, selected = fake_value(embeds), fake_value(mask)
    if value.ndim != 3 or not value.is_floating_point() or selected.ndim != 3 or selected.dtype != torch.bool:
        return None
    return mask if kind == "masked_scatter" or _compares_tokens(mask) else None


def _compares_tokens(mask: Node) -> bool:
    """Whether a mask is `tokens == a token`, seen through changes of shape."""
    while op_kind(mask) in ("unsqueeze", "getitem", "expand", "expand_as", "to"):
        mask = mask.all_input_nodes[0]
    if op_kind(mask) not in ("eq", "__eq__"):
        return False
    tokens = mask.all_input_nodes[0]
    return is_tensor(tokens) and fake_value(tokens).ndim == 2 and not fake_value(tokens).is_floating_point()
