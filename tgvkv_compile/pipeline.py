"""Which passes a graph from dynamo goes through, by what it is, and the way there: found, planned, rewritten."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.fx.dead_code import pin_effects
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.fx.verify import verify
from tgvkv_compile.passes.extract_vision_count import extract_vision_count
from tgvkv_compile.passes.find.find_appends import find_appends
from tgvkv_compile.passes.find.find_attention import find_attention
from tgvkv_compile.passes.find.find_embedding import find_embedding
from tgvkv_compile.passes.find.find_enclosed import find_enclosed
from tgvkv_compile.passes.find.find_modality import find_modality
from tgvkv_compile.passes.find.find_tensor_parallel import find_tensor_parallel
from tgvkv_compile.passes.insert.insert_budgeting import insert_budgeting
from tgvkv_compile.passes.insert.insert_capping import insert_capping
from tgvkv_compile.passes.insert.insert_continuation import insert_continuation
from tgvkv_compile.passes.insert.insert_decode import insert_decode
from tgvkv_compile.passes.insert.insert_eviction import insert_eviction
from tgvkv_compile.passes.insert.insert_rebudgeting import insert_rebudgeting
from tgvkv_compile.passes.insert.insert_scoring import insert_scoring
from tgvkv_compile.passes.insert.insert_survivors import insert_survivors
from tgvkv_compile.passes.insert.insert_whole_past import insert_whole_past
from tgvkv_compile.passes.materialise_masks import materialise_masks
from tgvkv_compile.passes.normalise_attention import normalise_attention
from tgvkv_compile.passes.plan_graph import plan_graph
from tgvkv_compile.passes.read_merges import read_merges
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite
from tgvkv_compile.plan import AttentionSite, GraphKind, GraphPlan, KVAppend, Miss, ModalityMask, TensorParallel
from tgvkv_compile.runner import Step, in_order, run_steps

STEPS: Mapping[GraphKind, tuple[Step, ...]] = {
    "prefill": in_order(
        Step(materialise_masks),
        Step(normalise_attention, requires=(materialise_masks,)),
        Step(insert_scoring, requires=(normalise_attention,)),
        Step(insert_capping, requires=(insert_scoring,)),
        Step(insert_budgeting, requires=(insert_scoring,)),
        Step(insert_eviction, requires=(insert_budgeting, insert_capping)),
    ),
    "decode": in_order(Step(insert_decode)),
    "continuation": in_order(
        Step(materialise_masks),
        Step(insert_continuation, requires=(materialise_masks,)),
    ),
    "vision_continuation": in_order(
        Step(materialise_masks),
        Step(insert_survivors, requires=(materialise_masks,)),
        Step(normalise_attention, requires=(insert_survivors,)),
        Step(insert_rebudgeting, requires=(insert_survivors, normalise_attention)),
    ),
    "late_prefill": in_order(
        Step(materialise_masks),
        Step(insert_whole_past, requires=(materialise_masks,)),
        Step(normalise_attention, requires=(insert_whole_past,)),
        Step(insert_rebudgeting, requires=(insert_whole_past, normalise_attention)),
    ),
}
"""What is done to each kind of graph, in order."""

COUNT_STEPS = in_order(
    Step(materialise_masks),
    Step(extract_vision_count, requires=(materialise_masks,)),
)
"""What makes a copy of a prefill count its vision tokens, before the prefill itself is rewritten."""


def check_stop_after(name: str | None) -> None:
    """Raises [`ConfigError`][] unless `name` is None or the name of a step."""
    names = dict.fromkeys(step.name for steps in STEPS.values() for step in steps)
    if name is not None and name not in names:
        raise ConfigError(f"stop_after={name!r} is not a pass; choose one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the finders found in one graph."""

    appends: tuple[KVAppend, ...]
    sites: tuple[AttentionSite, ...]
    modality: ModalityMask | None
    misses: tuple[Miss, ...]
    enclosed: tuple[Miss, ...]
    tensor_parallel: TensorParallel | None
    embedding: Node | None


def find_all(gm: GraphModule) -> Findings:
    """Runs every finder; changes nothing."""
    appends, append_misses = find_appends(gm)
    sites, site_misses = find_attention(gm, appends)
    tensor_parallel, split_misses = find_tensor_parallel(gm, sites)
    return Findings(
        appends,
        sites,
        find_modality(gm),
        append_misses + site_misses + split_misses,
        find_enclosed(gm),
        tensor_parallel,
        find_embedding(gm, appends),
    )


def plan_of(gm: GraphModule, compressed: frozenset[str]) -> GraphPlan:
    """Finds and plans; changes nothing.

    Args:
        gm: A traced graph with metadata.
        compressed: Names of the placeholders that hold handles.
    """
    return plan_found(find_all(gm), compressed)


def plan_found(found: Findings, compressed: frozenset[str]) -> GraphPlan:
    """Plans from what was found; see `plan_of`."""
    return plan_graph(
        found.appends,
        found.sites,
        found.modality,
        found.misses,
        enclosed=found.enclosed,
        compressed=compressed,
        embedding=found.embedding,
        tensor_parallel=found.tensor_parallel,
    )


def rewrite_graph(
    gm: GraphModule,
    inputs: list[Any],
    compressed: frozenset[str],
    config: EvictionConfig,
    sizes: ArenaSizes,
    *,
    stop_after: str | None = None,
    dumper: Dumper | None = None,
) -> Rewrite:
    """Runs every step that the graph's plan asks for, verifying after each.

    Args:
        gm: The graph from dynamo; it is copied, not changed.
        inputs: Its example inputs.
        compressed: Names of the placeholders that hold handles.
        config: The eviction options.
        sizes: What its arena is sized by.
        stop_after: Name of the last pass to run; the graph is then for looking at, not for running.
        dumper: Writes the graph before and after each step.

    Raises:
        InternalError: A step broke the graph.
    """
    rewrite = _begin(gm, inputs, compressed, config)
    rewrite.leave(sizes)
    if dumper is not None:
        dumper.graph(rewrite.gm, rewrite.plan.kind, "traced")
    run_steps(rewrite, STEPS.get(rewrite.plan.kind, ()), dumper=dumper, stop_after=stop_after)
    return rewrite


def vision_counter(gm: GraphModule, inputs: list[Any], config: EvictionConfig) -> GraphModule:
    """What tells, before a prefill runs, how many vision tokens each sample has: see `extract_vision_count`.

    Args:
        gm: The graph of a prefill, from dynamo; it is copied, not changed.
        inputs: Its example inputs.
        config: The eviction options.

    Returns:
        A graph of the prefill's inputs that returns int64 `[B]`.
    """
    rewrite = _begin(gm, inputs, frozenset(), config)
    run_steps(rewrite, COUNT_STEPS)
    return rewrite.gm


def _begin(gm: GraphModule, inputs: list[Any], compressed: frozenset[str], config: EvictionConfig) -> Rewrite:
    """A copy of a graph from dynamo, planned, in a shape environment of its own."""
    gm = copy_graph(gm)
    pin_effects(gm)
    environment = Environment()
    environment.adopt(gm, inputs)
    plan = plan_of(gm, compressed)
    verify(gm, after="adopt")
    return Rewrite(gm, environment, plan, config)


def with_merges_read(gm: GraphModule) -> GraphModule:
    """The graph without the calls that say what is vision among its inputs, a copy where it had any; see `read_merges`."""
    if not any(op_kind(node) == "merged" for node in gm.graph.nodes):
        return gm
    other = copy_graph(gm)
    read_merges(other)
    return other


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that keeps what dynamo wrote on the graph's inputs: which are weights decides what CUDA graphs copy."""
    other = copy.deepcopy(gm)
    pairs = zip(gm.graph.find_nodes(op="placeholder"), other.graph.find_nodes(op="placeholder"), strict=True)
    for old, new in pairs:
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(other, name, getattr(gm, name))
    return other
