"""Find the token embedding: whether the graph sees the prompt's tokens, or is handed their embeddings."""

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import OF_TOKENS
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.plan import KVAppend


def find_embedding(gm: GraphModule, appends: tuple[KVAppend, ...]) -> Node | None:
    """Finds the embedding lookup that the first KV append is computed from, or the input that holds what is known of it.

    Before (nothing is changed)::

        %embeds : f32[B, N, hidden]    = embedding(%input_ids, %weight)
        %new    : f32[B, Hkv, N, D]    = ...                                  # computed from %embeds

    Returns:
        The lookup, or None: embeddings come into the graph ready-made, so vision may be among them unseen.
    """
    pending = [append.new for append in appends[:1]]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if op_kind(node) == "embedding" or OF_TOKENS in node.meta:
            return node
        parents = [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(parents)
        pending += parents
    return None
