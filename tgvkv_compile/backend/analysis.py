"""What a graph from dynamo is, and why it must not run as it is: the same for the backend and for `explain`."""

import dataclasses
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from tgvkv_compile.backend import dynamo
from tgvkv_compile.backend.remedies import break_text, packed_layer, unseen_text
from tgvkv_compile.errors import NoAttentionError, SplitDecoderError, TgvkvError, UnsupportedGraphError
from tgvkv_compile.fx.meta import source_line
from tgvkv_compile.fx.subgraphs import all_nodes
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.passes.plan_graph import UNSEEN
from tgvkv_compile.pipeline import Findings, find_all, plan_found, with_merges_read
from tgvkv_compile.plan import GraphPlan, render_misses
from tgvkv_compile.runtime.logical import LogicalKV


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One graph from dynamo, looked at and not changed.

    Attributes:
        gm: The graph; where it said what is vision among its inputs, a copy that has read it.
        inputs: Its example inputs, handles included.
        compressed: Names of the inputs that are handles.
        found: What the finders found.
        plan: What is to be done with it.
        broke: Dynamo's reason where the graph ends at a graph break.
        problem: Why it must not run as it is; None where it may.
    """

    gm: GraphModule
    inputs: list[Any]
    compressed: frozenset[str]
    found: Findings
    plan: GraphPlan
    broke: Any | None
    problem: TgvkvError | None

    @property
    def sizes(self) -> list[Any]:
        """The inputs without their tensors, for what outlives the call: tensors would keep this request's cache alive."""
        return [None if isinstance(value, Tensor) else value for value in self.inputs]


def analyse(gm: GraphModule, inputs: list[Any]) -> Analysis:
    """Finds and plans; changes nothing.

    Args:
        gm: From dynamo.
        inputs: From dynamo, handles included.
    """
    gm = with_merges_read(gm)
    examples = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    compressed = frozenset(node.name for node, example in examples if isinstance(example, LogicalKV))
    found = find_all(gm)
    plan = plan_found(found, compressed)
    broke = dynamo.graph_break(gm)
    return Analysis(gm, inputs, compressed, found, plan, broke, _problem_of(gm, plan, broke))


def _problem_of(gm: GraphModule, plan: GraphPlan, reason: Any | None) -> TgvkvError | None:
    """Why a graph, which ended at the graph break `reason`, must not run as it is; None where it may."""
    where = break_text(reason)
    packed = packed_layer(reason)
    if packed is not None and _breaks_decoder(gm, plan, reason):
        return UnsupportedGraphError(f"tgvkv: {packed}")
    if plan.misses:
        listed = render_misses(plan.misses)
        what_to_do = unseen_text(gm) if plan.reason == UNSEEN else where
        return UnsupportedGraphError(
            f"tgvkv: {plan.reason}; {len(plan.misses)} sites cannot be rewritten:\n{listed}{what_to_do}"
        )
    if plan.kind == "dense":
        attends = any(op_kind(node) in ("sdpa", "flex", "softmax") for node in all_nodes(gm))  # without a cache: not ours
        if plan.modality is None or attends:
            return None
        if reason is not None:
            return SplitDecoderError(f"dynamo split the decoder before its first attention{where}")
        merge = plan.modality.merges[0]
        found = f"%{merge.name} at {source_line(merge)}"
        return NoAttentionError(
            f"vision features are merged ({found}), but no attention was found in the graph; nothing would be evicted"
        )
    if reason is not None and dynamo.breaks_inside(reason, plan.sites[-1].node):
        return SplitDecoderError(f"dynamo split the decoder after {plan.num_layers} layers{where}")
    return None


def _breaks_decoder(gm: GraphModule, plan: GraphPlan, reason: Any) -> bool:
    """Whether a graph that cannot be rewritten ends at a break inside of the decoder."""
    missed = {miss.node for miss in plan.misses}
    merges_only = plan.kind == "dense" and plan.modality is not None and not missed
    return merges_only or any(dynamo.breaks_inside(reason, node) for node in gm.graph.nodes if node.name in missed)
