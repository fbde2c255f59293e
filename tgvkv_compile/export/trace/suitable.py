"""What an export cannot take: told before tracing where it can be, and never exported as something else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.errors import ConfigError, UnsupportedGraphError
from tgvkv_compile.export.trace.families import MASK
from tgvkv_compile.ops.attention.masks import visible
from tgvkv_compile.plan import GraphPlan

_DTYPES = (torch.float32, torch.float16)
_REASONS = {
    torch.bfloat16: "ONNX has no convolution in it at the opset that TensorRT takes, and Torch-TensorRT cuts it in a `where`",
    torch.float64: "ONNX Runtime and TensorRT lack operators in it",
}


def check_dtype(dtype: torch.dtype) -> None:
    """Raises [`ConfigError`][] for a floating dtype of weights that engines cannot compute in."""
    if dtype.is_floating_point and dtype not in _DTYPES:
        why = _REASONS.get(dtype, "no engine has operators in it")
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"weights in {name} cannot be exported: {why}; load the model with dtype='float32' or 'float16'")


def check_dtypes(model: torch.nn.Module) -> None:
    """Raises [`ConfigError`][] for a model that has weights or buffers in such a dtype."""
    for tensor in (*model.parameters(), *model.buffers()):
        check_dtype(tensor.dtype)


def check_implementation(model: torch.nn.Module) -> None:
    """Raises [`ConfigError`][] for an attention implementation that cannot be traced, in the decoder or an encoder."""
    for module in model.modules():
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(name, str) and name.startswith(("flex", "flash", "paged")):
            raise ConfigError(
                f"attn_implementation={name!r} of {type(module).__name__} cannot be exported: engines have no such attention; "
                "load the model with attn_implementation='sdpa'"
            )


def check_causal(gm: GraphModule, found: GraphPlan, inputs: Sequence[Tensor]) -> None:
    """Raises unless every layer sees the valid tokens up to itself, and no others: what the rewritten attention computes.

    Masks are evaluated, on the example inputs and with a token of padding. Attention without a mask must be causal.

    Raises:
        UnsupportedGraphError: A layer has another mask (a sliding window, bidirectional images, ...), or none.
    """
    for site in found.sites:
        if site.mask is None and not site.is_causal:
            why = (
                "is in a mask function" if site.mask_function is not None else "is missing, so that every token sees all others"
            )
            raise UnsupportedGraphError(
                f"the mask of the attention %{site.node.name} {why}: this export knows causal attention alone. {_OTHERS}"
            )
    masks = _masks(found)
    if not masks:
        return
    of_masks = _graph_of(gm, masks)
    given = dict(zip([node.name for node in gm.graph.find_nodes(op="placeholder")], inputs, strict=True))
    padded = given[MASK].clone()
    padded[:, 0] = 0
    for attention_mask in (given[MASK], padded):
        valid = attention_mask != 0
        length = valid.shape[1]
        expected = torch.ones((length, length), dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]
        rows = valid[:, None, :, None]
        with torch.no_grad():
            computed = of_masks(*{**given, MASK: attention_mask}.values())
        for node, mask in zip(masks, computed, strict=True):
            if not torch.equal((visible(mask) & rows).expand_as(expected), expected & rows):
                raise UnsupportedGraphError(
                    f"the attention mask %{node.name} is not the causal one: this export knows causal attention alone. "
                    f"{_OTHERS}"
                )


def check_sees_all(gm: GraphModule, found: GraphPlan, inputs: Sequence[Tensor]) -> None:
    """Raises unless a decode step's token sees all of its past, as the rewritten step does.

    Raises:
        UnsupportedGraphError: A layer hides some of it.
    """
    masks = _masks(found)
    if not masks:
        return
    with torch.no_grad():
        computed = _graph_of(gm, masks)(*inputs)
    for node, mask in zip(masks, computed, strict=True):
        if not bool(visible(mask).all()):
            raise UnsupportedGraphError(
                f"the attention mask %{node.name} of a decode step hides some of the past: this export knows causal attention "
                f"alone. {_OTHERS}"
            )


_OTHERS = "torch.compile with tgvkv_backend takes other masks"


def _masks(found: GraphPlan) -> list[Node]:
    return list(dict.fromkeys(site.mask for site in found.sites if site.mask is not None))


def _graph_of(gm: GraphModule, nodes: list[Node]) -> Any:
    """The part of the graph that these nodes are computed by."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph.output(tuple(copies[node] for node in nodes))
    graph.eliminate_dead_code()
    return GraphModule(gm, graph)
