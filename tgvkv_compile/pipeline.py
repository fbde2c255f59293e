"""The ordered list of steps that turn a traced graph into a rewritten one, and the record of what they did."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.fx.dead_code import pin_effects
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.fx.verify import verify
from tgvkv_compile.ops.state import CompactState, Survivors
from tgvkv_compile.passes.extract_vision_count import extract_vision_count
from tgvkv_compile.passes.find_appends import find_appends
from tgvkv_compile.passes.find_attention import find_attention
from tgvkv_compile.passes.find_embedding import find_embedding
from tgvkv_compile.passes.find_enclosed import find_enclosed
from tgvkv_compile.passes.find_modality import find_modality
from tgvkv_compile.passes.find_tensor_parallel import find_tensor_parallel
from tgvkv_compile.passes.insert_budgeting import insert_budgeting
from tgvkv_compile.passes.insert_capping import insert_capping
from tgvkv_compile.passes.insert_continuation import insert_continuation
from tgvkv_compile.passes.insert_decode import insert_decode
from tgvkv_compile.passes.insert_eviction import insert_eviction
from tgvkv_compile.passes.insert_rebudgeting import insert_rebudgeting
from tgvkv_compile.passes.insert_scoring import insert_scoring
from tgvkv_compile.passes.insert_survivors import insert_survivors
from tgvkv_compile.passes.insert_whole_past import insert_whole_past
from tgvkv_compile.passes.inserted import Budgets, Candidates, LayerCandidates, Scores
from tgvkv_compile.passes.materialise_masks import materialise_masks
from tgvkv_compile.passes.normalise_attention import normalise_attention
from tgvkv_compile.passes.plan_graph import plan_graph
from tgvkv_compile.passes.read_merges import read_merges
from tgvkv_compile.plan import AttentionSite, GraphKind, KVAppend, Miss, ModalityMask, Plan, TensorParallel


@dataclasses.dataclass
class Rewrite:
    """One graph on its way through the steps.

    Attributes:
        gm: The graph; a copy of what dynamo gave.
        environment: The shape environment its metadata lives in.
        plan: What is being done.
        reserve: Decode steps that freshly packed segments leave room for.
        arena_slots: T of the example call, for the steps that size an arena.
        prefill_cap: How many candidates a layer may have, as a multiple of the mean budget; None: all its tokens.
        scores, budgets, candidates, capped: What inserters left for those after them.
    """

    gm: GraphModule
    environment: Environment
    plan: Plan
    config: EvictionConfig
    reserve: int
    arena_slots: int
    prefill_cap: float | None = None
    scores: Scores | None = None
    budgets: Budgets | None = None
    candidates: Candidates | None = None
    capped: tuple[LayerCandidates, ...] | None = None

    def pending(self) -> frozenset[Node]:
        """Inserted nodes that no node may use yet."""
        scores, budgets = self.scores, self.budgets
        nodes = [node for site in self.plan.sites for node in (site.lse, site.mask) if node is not None]
        nodes += [scores.roles, *scores.mass, *scores.score, *scores.tier] if scores is not None else []
        nodes += [budgets.allocation] if budgets is not None else []
        nodes += [node for layer in self.capped or () for node in vars(layer).values()]
        if self.candidates is not None:
            nodes += [*self.candidates.roles, self.candidates.history, self.candidates.keep_rate]
        return frozenset(nodes)


def _materialise(rewrite: Rewrite) -> None:
    rewrite.plan = materialise_masks(rewrite.gm, rewrite.plan)


def _normalise(rewrite: Rewrite) -> None:
    rewrite.plan = normalise_attention(rewrite.gm, rewrite.plan)


def _score(rewrite: Rewrite) -> None:
    rewrite.scores = insert_scoring(rewrite.gm, rewrite.plan, rewrite.config)


def _budget(rewrite: Rewrite) -> None:
    assert rewrite.scores is not None
    rewrite.budgets = insert_budgeting(rewrite.gm, rewrite.plan, rewrite.scores, rewrite.config)


def _cap(rewrite: Rewrite) -> None:
    if rewrite.prefill_cap is not None:
        assert rewrite.scores is not None
        scores, config, cap = rewrite.scores, rewrite.config, rewrite.prefill_cap
        rewrite.capped = insert_capping(rewrite.gm, rewrite.plan, scores, config, cap)


def _evict(rewrite: Rewrite) -> None:
    assert rewrite.scores is not None and rewrite.budgets is not None
    slots = rewrite.environment.symbol("tgvkv_slots", rewrite.arena_slots)
    decided = (rewrite.plan, rewrite.scores, rewrite.budgets, rewrite.config)
    insert_eviction(rewrite.gm, *decided, rewrite.reserve, slots, rewrite.capped)


def _decode(rewrite: Rewrite) -> None:
    insert_decode(rewrite.gm, rewrite.plan, rewrite.config, fake_state(rewrite))


def _continue(rewrite: Rewrite) -> None:
    insert_continuation(rewrite.gm, rewrite.plan, fake_state(rewrite))


def _survive(rewrite: Rewrite) -> None:
    rewrite.plan, rewrite.candidates = insert_survivors(rewrite.gm, rewrite.plan, *_fake_survivors(rewrite))


def _survive_whole(rewrite: Rewrite) -> None:
    rewrite.plan, rewrite.candidates = insert_whole_past(rewrite.gm, rewrite.plan)


def _rebudget(rewrite: Rewrite) -> None:
    assert rewrite.candidates is not None
    insert_rebudgeting(rewrite.gm, rewrite.plan, rewrite.candidates, rewrite.config)


@dataclasses.dataclass(frozen=True)
class Step:
    """One inserter: its name (for `stop_after` and dumps), the kinds of graph it is for, and what it does.

    `requires` names steps that ran before.
    """

    name: str
    kinds: frozenset[GraphKind]
    run: Callable[[Rewrite], None]
    requires: tuple[str, ...] = ()


STEPS: tuple[Step, ...] = (
    Step("materialise_masks", frozenset({"prefill", "continuation", "vision_continuation", "late_prefill"}), _materialise),
    Step("insert_survivors", frozenset({"vision_continuation"}), _survive, requires=("materialise_masks",)),
    Step("insert_whole_past", frozenset({"late_prefill"}), _survive_whole, requires=("materialise_masks",)),
    Step("normalise_attention", frozenset({"prefill", "vision_continuation", "late_prefill"}), _normalise),
    Step("insert_scoring", frozenset({"prefill"}), _score, requires=("normalise_attention",)),
    Step("insert_capping", frozenset({"prefill"}), _cap, requires=("insert_scoring",)),
    Step("insert_budgeting", frozenset({"prefill"}), _budget, requires=("insert_scoring",)),
    Step("insert_eviction", frozenset({"prefill"}), _evict, requires=("insert_budgeting",)),
    Step("insert_decode", frozenset({"decode"}), _decode),
    Step("insert_continuation", frozenset({"continuation"}), _continue, requires=("materialise_masks",)),
    Step(
        "insert_rebudgeting",
        frozenset({"vision_continuation", "late_prefill"}),
        _rebudget,
        requires=("insert_survivors", "normalise_attention"),
    ),
)


def _check_order() -> None:
    seen: set[str] = set()
    for step in STEPS:
        missing = [name for name in step.requires if name not in seen]
        assert not missing, f"step {step.name} stands before {missing}"
        seen.add(step.name)


_check_order()


def check_stop_after(name: str | None) -> None:
    """Raises [`ConfigError`][] unless `name` is None or the name of a step."""
    names = [step.name for step in STEPS]
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


def plan_of(gm: GraphModule, compressed: frozenset[str]) -> Plan:
    """Finds and plans; changes nothing.

    Args:
        gm: A traced graph with metadata.
        compressed: Names of the placeholders that hold handles.
    """
    return plan_found(find_all(gm), compressed)


def plan_found(found: Findings, compressed: frozenset[str]) -> Plan:
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
    *,
    reserve: int,
    arena_slots: int,
    prefill_cap: float | None = None,
    stop_after: str | None = None,
    dumper: Dumper | None = None,
) -> Rewrite:
    """Runs every step that the graph's plan asks for, verifying after each.

    Args:
        gm: The graph from dynamo; it is copied, not changed.
        inputs: Its example inputs.
        compressed: Names of the placeholders that hold handles.
        config: The eviction options.
        reserve: Decode steps to leave room for in fresh segments.
        arena_slots: T of this first call (of the prefill's arena to be, or of the arena that comes in).
        prefill_cap: How many candidates a layer may have in a prefill, as a multiple of the mean budget; None: all its tokens.
        stop_after: Name of the last step to run; the graph is then for looking at, not for running.
        dumper: Writes the graph before and after each step.

    Raises:
        InternalError: A step broke the graph.
    """
    gm, environment = _adopted(gm, inputs)
    rewrite = Rewrite(gm, environment, plan_of(gm, compressed), config, reserve, arena_slots, prefill_cap)
    verify(gm, after="adopt")
    if dumper is not None:
        dumper.graph(gm, rewrite.plan.kind, "traced")
    for step in STEPS:
        if rewrite.plan.kind not in step.kinds:
            continue
        with environment.tracing():
            step.run(rewrite)
        verify(gm, after=step.name, pending=rewrite.pending())
        if dumper is not None:
            dumper.graph(gm, rewrite.plan.kind, step.name)
        if stop_after == step.name:
            break
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
    gm, environment = _adopted(gm, inputs)
    with environment.tracing():
        plan = materialise_masks(gm, plan_of(gm, frozenset()))
        extract_vision_count(gm, plan, config)
    verify(gm, after="extract_vision_count")
    return gm


def _adopted(gm: GraphModule, inputs: list[Any]) -> tuple[GraphModule, Environment]:
    """A copy of a graph from dynamo in a shape environment of its own."""
    gm = copy_graph(gm)
    pin_effects(gm)
    environment = Environment()
    environment.adopt(gm, inputs)
    return gm, environment


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


def fake_state(rewrite: Rewrite) -> CompactState:
    """Fake tensors of a compact state of the rewritten graph's shapes; the arena's size is symbolic."""
    key = fake_tensor(rewrite.plan.sites[0].key.node)
    value = fake_tensor(rewrite.plan.sites[0].value.node)
    batch, heads, _, dim = key.shape
    layers, device = rewrite.plan.num_layers, key.device
    env = rewrite.environment
    slots = env.symbol("tgvkv_slots", rewrite.arena_slots)
    arena = (batch, heads, slots, dim)
    per_layer = (batch, layers)
    return CompactState(
        env.tensor(arena, key.dtype, device),
        env.tensor(arena, value.dtype, device),
        env.tensor((batch, slots), torch.int32, device),
        env.tensor(per_layer, torch.int64, device),
        env.tensor(per_layer, torch.int64, device),
        env.tensor(per_layer, torch.int64, device),
        env.tensor(per_layer, torch.int64, device),
        env.tensor(per_layer, torch.float32, device),
        env.tensor((batch,), torch.int64, device),
    )


def _fake_survivors(rewrite: Rewrite) -> tuple[tuple[Tensor, ...], list[Survivors]]:
    """Fake inputs of a turn with new vision: what all layers share, and every layer's survivors, each of its own width."""
    env, layers = rewrite.environment, rewrite.plan.num_layers
    site = rewrite.plan.sites[0]
    assert site.key.past is not None and site.value.past is not None
    pasts = fake_tensor(site.key.past), fake_tensor(site.value.past)
    (batch, heads, length, dim), device = pasts[0].shape, pasts[0].device
    shared = (
        env.tensor((batch, length), torch.bool, device),
        env.tensor((batch,), torch.int64, device),
        env.tensor((batch, layers), torch.float32, device),
    )
    survivors = []
    for layer in range(layers):
        width = env.symbol(f"tgvkv_width_{layer}", max(2, rewrite.arena_slots // layers))
        key, value = (env.tensor((batch, heads, width, dim), past.dtype, device) for past in pasts)
        survivors.append(Survivors(key, value, env.tensor((batch, width), torch.int64, device)))
    return shared, survivors
