"""Find additions: where a decoder layer adds vision features to its vision tokens (Qwen3-VL's deepstack)."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.fx.meta import fake_value, is_tensor
from tgvkv_compile.fx.targets import argument, op_kind
from tgvkv_compile.plan import FeatureAddition


def find_additions(gm: GraphModule) -> tuple[FeatureAddition, ...]:
    """Finds additions through a boolean index, in exported graphs.

    Nothing is changed::

        %picked : [vision, hidden] = index(%hidden, [%mask])
        %sum    : [vision, hidden] = add(%picked, %features)
        %node   : [B, N, hidden]   = index_put(%hidden, [%mask], %sum)
    """
    return tuple(found for node in gm.graph.nodes if (found := _match(node)) is not None)


def _match(node: Node) -> FeatureAddition | None:
    if (
        node.op != "call_function"
        or node.target is not torch.ops.aten.index_put.default
        or argument(node, 3, "accumulate", False)
    ):
        return None
    hidden, mask, added = argument(node, 0, "self"), _only(argument(node, 1, "indices")), argument(node, 2, "values")
    if mask is None or not isinstance(added, Node) or op_kind(added) != "add":
        return None
    picked, features = added.args[:2]
    if not isinstance(picked, Node) or picked.target is not torch.ops.aten.index.Tensor or not is_tensor(features):
        return None
    if picked.args[0] is not hidden or _only(picked.args[1]) is not mask:
        return None
    return FeatureAddition(node, hidden, mask, features)  # type: ignore[arg-type]


def _only(indices: Any) -> Node | None:
    """The one index, if it is a bool `[B, N]`."""
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not is_tensor(indices[0]):
        return None
    value = fake_value(indices[0])
    return indices[0] if value.dtype == torch.bool and value.ndim == 2 else None
