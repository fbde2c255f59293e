"""The rewritten graphs of an engine: the passes of fixed shapes, verified one by one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.errors import UnsupportedGraphError, first_line
from tgvkv_compile.export.budget_plan import BudgetPlan
from tgvkv_compile.export.families import MASK
from tgvkv_compile.export.suitable import check_causal, check_sees_all
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.fx.verify import verify
from tgvkv_compile.passes.drop_assertions import drop_assertions
from tgvkv_compile.passes.drop_empty_pasts import drop_empty_pasts
from tgvkv_compile.passes.find_additions import find_additions
from tgvkv_compile.passes.insert_fixed_decode import insert_fixed_decode
from tgvkv_compile.passes.insert_fixed_eviction import insert_fixed_eviction
from tgvkv_compile.passes.insert_fixed_scoring import insert_fixed_scoring
from tgvkv_compile.passes.insert_gathers import insert_gathers
from tgvkv_compile.passes.inserted import Scores
from tgvkv_compile.pipeline import plan_of
from tgvkv_compile.plan import Plan, render_misses


def state_names(num_layers: int) -> list[str]:
    """Names of the tensors that prefill returns behind the logits, and that decode takes, in order."""
    of_layers = [f"{part}_{layer}" for layer in range(num_layers) for part in ("key", "value", "slot_position")]
    return [*of_layers, "protect_from", "keep_rate", "lengths"]


@dataclasses.dataclass
class Rewrite:
    """One exported graph on its way through the steps.

    Attributes:
        gm: The graph.
        found: Its plan.
        budgets: The capacities.
        blocks: How many blocks the rows of attention are walked in (prefill).
        question_rows: The most tokens of a question (prefill).
        state: Fake values of the compact cache, by name (decode).
        scores: What `insert_fixed_scoring` left for those after it.
    """

    gm: GraphModule
    found: Plan
    budgets: BudgetPlan
    blocks: int = 1
    question_rows: int = 1
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    scores: Scores | None = None

    def pending(self) -> frozenset[Node]:
        """Inserted nodes that no node may use yet."""
        scores = self.scores
        return frozenset() if scores is None else frozenset((scores.roles, *scores.mass, *scores.score, *scores.tier))


def _drop_pasts(rewrite: Rewrite) -> None:
    rewrite.found = drop_empty_pasts(rewrite.gm, rewrite.found)


def _gather(rewrite: Rewrite) -> None:
    insert_gathers(rewrite.gm, rewrite.found, find_additions(rewrite.gm))


def _score(rewrite: Rewrite) -> None:
    mask = next(iter(rewrite.gm.graph.find_nodes(op="placeholder", target=MASK)))
    sizes = {"blocks": rewrite.blocks, "question_rows": rewrite.question_rows}
    rewrite.scores = insert_fixed_scoring(rewrite.gm, rewrite.found, rewrite.budgets.eviction, mask, **sizes)


def _evict(rewrite: Rewrite) -> None:
    assert rewrite.scores is not None
    budgets = rewrite.budgets
    sizes = (budgets.eviction, budgets.capacities, budgets.max_new_tokens)
    insert_fixed_eviction(rewrite.gm, rewrite.found, rewrite.scores, *sizes)


def _decode(rewrite: Rewrite) -> None:
    insert_fixed_decode(rewrite.gm, rewrite.found, rewrite.budgets.eviction, rewrite.state)


STEPS: dict[str, tuple[tuple[str, Callable[[Rewrite], None]], ...]] = {
    "prefill": (
        ("drop_empty_pasts", _drop_pasts),
        ("insert_gathers", _gather),
        ("insert_fixed_scoring", _score),
        ("insert_fixed_eviction", _evict),
    ),
    "decode": (("insert_fixed_decode", _decode),),
}
"""What is done to each graph, in order, once `drop_assertions` has run and it was found and planned."""


def rewrite_prefill(gm: GraphModule, inputs: Sequence[Tensor], plan: BudgetPlan, blocks: int, question_rows: int) -> None:
    """Rewrites a traced prefill in place: merges, attention with scores, eviction.

    Args:
        gm: Of `traced_prefill`.
        inputs: Its example inputs.
        plan: The capacities.
        blocks: How many blocks the rows of attention are walked in.
        question_rows: The most tokens of a question.

    Raises:
        UnsupportedGraphError: It holds something that fixed shapes do not allow.
    """
    environment = _adopted(gm, inputs)
    found = plan_of(gm, frozenset())
    _check(found, "prefill", plan.num_layers)
    check_causal(gm, found, inputs)
    _run("prefill", Rewrite(gm, found, plan, blocks, question_rows), environment)


def rewrite_decode(gm: GraphModule, inputs: Sequence[Tensor], plan: BudgetPlan) -> dict[str, Tensor]:
    """Rewrites a traced decode step in place.

    Args:
        gm: Of `traced_decode`.
        inputs: Its example inputs.
        plan: The capacities.

    Returns:
        An empty cache, by the names of the new inputs.

    Raises:
        UnsupportedGraphError: It is not a decode step of so many layers.
    """
    environment = _adopted(gm, inputs)
    pasts = [node.name for node in gm.graph.find_nodes(op="placeholder") if node.name.startswith("past_")]
    found = plan_of(gm, frozenset(pasts))
    _check(found, "decode", plan.num_layers)
    check_sees_all(gm, found, inputs)
    state = _empty_state(found, plan)
    fake: dict[str, Tensor] = {name: environment.fake_mode.from_tensor(value) for name, value in state.items()}
    _run("decode", Rewrite(gm, found, plan, state=fake), environment)
    return state


def _run(kind: str, rewrite: Rewrite, environment: Environment) -> None:
    for name, run in STEPS[kind]:
        with environment.tracing():
            run(rewrite)
        verify(rewrite.gm, after=name, pending=rewrite.pending())


def _adopted(gm: GraphModule, inputs: Sequence[Tensor]) -> Environment:
    drop_assertions(gm)
    environment = Environment()
    environment.adopt(gm, list(inputs))
    verify(gm, after="drop_assertions")
    return environment


def _check(found: Plan, kind: str, layers: int) -> None:
    if found.kind != kind:
        misses = f"\n{render_misses(found.misses)}" if found.misses else ""
        raise UnsupportedGraphError(f"the exported graph should be a {kind}, and is {found.kind}: {found.reason}{misses}")
    if found.num_layers != layers:
        raise UnsupportedGraphError(
            f"the model has {found.num_layers} layers that evict, the budget plan has capacities for {layers}; make a plan for "
            "this model"
        )


def _empty_state(found: Plan, plan: BudgetPlan) -> dict[str, Tensor]:
    made: list[Tensor] = []
    for site, slots in zip(found.sites, plan.capacities, strict=True):
        for append in (site.key, site.value):
            new = fake_tensor(append.new)
            batch, heads, _, dim = new.shape
            made.append(torch.zeros((batch, heads, slots, dim), dtype=new.dtype, device=new.device))
        made.append(torch.full((batch, slots), -1, dtype=torch.int64, device=new.device))
    per_layer = (batch, plan.num_layers)
    made.append(torch.zeros(per_layer, dtype=torch.int64, device=new.device))
    made.append(torch.ones(per_layer, dtype=torch.float32, device=new.device))
    made.append(torch.ones((batch,), dtype=torch.int64, device=new.device))
    return dict(zip(state_names(plan.num_layers), made, strict=True))


def exported(
    gm: GraphModule, inputs: Sequence[Tensor], shapes: Sequence[dict[int, Any] | None] | None
) -> torch.export.ExportedProgram:
    """The rewritten graph, traced down to aten operations.

    Raises:
        UnsupportedGraphError: It cannot be traced.
    """
    try:
        with torch.no_grad():
            return torch.export.export(
                gm, tuple(inputs), dynamic_shapes=None if shapes is None else tuple(shapes), strict=False
            )
    except Exception as error:  # torch.export has no common class of errors
        raise UnsupportedGraphError(f"torch.export cannot trace the rewritten graph: {first_line(error)}") from error
