"""Records passed from the finders to the planner and from the planner to the inserters.

Legend used everywhere: `B` batch, `H` query heads, `Hkv` key/value heads, `N` prompt, `S` sequence, `Q` queries of this
call, `D` head dim, `L` layers, `T` arena slots.
"""

import dataclasses
from typing import Any, Literal

from torch.fx import Node

GraphKind = Literal["prefill", "decode", "continuation", "vision_continuation", "late_prefill", "dense"]
AttentionForm = Literal["sdpa", "eager", "flex"]


@dataclasses.dataclass(frozen=True)
class Miss:
    """Something that looks like a site and cannot be rewritten.

    Attributes:
        node: Name of the graph node.
        target: What the node calls.
        reason: Why it is not a site.
        source: `file:line, code` of the model source that made the node, or `"(source unknown)"`.
    """

    node: str
    target: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"%{self.node} = {self.target}: {self.reason}\n      at {self.source}"


def render_misses(misses: tuple[Miss, ...]) -> str:
    """One indented paragraph per miss, for error messages and reports."""
    return "\n".join(f"  - {miss}" for miss in misses)


@dataclasses.dataclass(frozen=True)
class KVAppend:
    """`joined = cat([past, new], dim=-2)`, stored back into the cache by a graph output.

    Attributes:
        node: The `cat`, `[B, Hkv, S, D]`.
        past: The placeholder that holds the past, or None where the past is the empty tensor of a first call.
        new: The new keys or values, `[B, Hkv, Q, D]`.
        output: Which of the graph's outputs stores it back.
    """

    node: Node
    past: Node | None
    new: Node
    output: int


@dataclasses.dataclass(frozen=True)
class MaskFunction:
    """The mask of a `flex_attention`: a graph of its own, of scalar indices.

    Attributes:
        function: The `get_attr` of the graph `(b, h, q, kv, *captured) -> bool`, True = visible.
        captured: What else it takes: nodes and constants.
    """

    function: Node
    captured: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention over a KV append.

    Attributes:
        node: The node whose value is the attention output `[B, H, Q, D]`.
        form: How it is written: one `scaled_dot_product_attention`, the eager chain that ends in a `matmul`, or one
            `flex_attention`.
        query: `[B, H, Q, D]`.
        key: The append of the keys.
        value: The append of the values.
        mask: `[B|1, 1|H, Q, S]`, bool (True = visible) or additive float, or None.
        mask_function: What flex attention has in place of `mask`, until `materialise_masks` has made one of it.
        is_causal: Whether the mask is the causal one (then `mask` is None).
        scale: What `q @ k` is multiplied by.
        lse: Log-sum-exp of the rows, float32 `[B, H, Q]`, once `normalise_attention` has asked for it.
    """

    node: Node
    form: AttentionForm
    query: Node
    key: KVAppend
    value: KVAppend
    mask: Node | None
    is_causal: bool
    scale: float
    mask_function: MaskFunction | None = None
    lse: Node | None = None


@dataclasses.dataclass(frozen=True)
class ModalityMask:
    """Which positions are vision placeholders: the masks of the `masked_scatter`s that merge vision features.

    Attributes:
        masks: bool `[B, N, 1]` or `[B, N, hidden]`, one per merge (images, video); in the graph, or inputs of it.
        merges: The `masked_scatter` (or `where`) nodes, and inputs that hold embeddings which another graph merged.
    """

    masks: tuple[Node, ...]
    merges: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class FeatureAddition:
    """One `hidden[mask] += features` of an exported graph.

    Attributes:
        node: The result, `[B, N, hidden]`.
        hidden: `[B, N, hidden]`.
        mask: bool `[B, N]`.
        features: `[.., hidden]`, a row per True of the mask.
    """

    node: Node
    hidden: Node
    mask: Node
    features: Node


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """Each rank of a process group holds some of the query heads of every layer.

    Attributes:
        group: Name of the process group.
    """

    group: str


@dataclasses.dataclass(frozen=True)
class GraphPlan:
    """What is to be done with one graph.

    Attributes:
        kind: `prefill` (vision, empty past), `decode` (one query, compressed past), `continuation` (several queries,
            compressed past), `vision_continuation` (vision, compressed past), `late_prefill` (vision, uncompressed
            past) or `dense` (not ours: left as it is).
        reason: Why, in one sentence.
        sites: The attention sites in layer order.
        modality: The modality mask of a prefill or of a later turn with new vision.
        misses: Why a graph that holds a decoder cannot be rewritten; then `kind` is `dense`.
        tensor_parallel: How heads are split over processes, or None.
        additions: Where layers add vision features to hidden states, in exported graphs.
    """

    kind: GraphKind
    reason: str
    sites: tuple[AttentionSite, ...] = ()
    modality: ModalityMask | None = None
    misses: tuple[Miss, ...] = ()
    tensor_parallel: TensorParallel | None = None
    additions: tuple[FeatureAddition, ...] = ()

    @property
    def num_layers(self) -> int:
        """How many layers hold evictable KV."""
        return len(self.sites)
