"""The rewritten graphs of an engine: the passes of static shapes, verified one by one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tgvkv_compile.errors import UnsupportedGraphError, first_line
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.trace.families import MASK
from tgvkv_compile.export.trace.suitable import check_causal, check_sees_all
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.fx.verify import verify
from tgvkv_compile.ops.static.selection import PackedLayer
from tgvkv_compile.passes.drop_assertions import drop_assertions
from tgvkv_compile.passes.find.find_additions import find_additions
from tgvkv_compile.passes.rewrite import Rewrite, StaticDecode, StaticPrefill
from tgvkv_compile.passes.static.drop_empty_pasts import drop_empty_pasts
from tgvkv_compile.passes.static.insert_fixed_decode import insert_fixed_decode
from tgvkv_compile.passes.static.insert_fixed_eviction import insert_fixed_eviction
from tgvkv_compile.passes.static.insert_fixed_scoring import insert_fixed_scoring
from tgvkv_compile.passes.static.insert_gathers import insert_gathers
from tgvkv_compile.pipeline import plan_of
from tgvkv_compile.plan import GraphKind, GraphPlan, render_misses
from tgvkv_compile.runner import Step, in_order, run_steps


def state_names(num_layers: int) -> list[str]:
    """Names of the tensors that prefill returns behind the logits, and that decode takes, in order."""
    of_layers = [f"{part}_{layer}" for layer in range(num_layers) for part in PackedLayer._fields]
    return [*of_layers, "protect_from", "keep_rate", "lengths"]


STEPS: Mapping[GraphKind, tuple[Step, ...]] = {
    "prefill": in_order(
        Step(drop_empty_pasts),
        Step(insert_gathers),
        Step(insert_fixed_scoring),
        Step(insert_fixed_eviction, requires=(insert_fixed_scoring,)),
    ),
    "decode": in_order(Step(insert_fixed_decode)),
}
"""What is done to each graph, in order, once `drop_assertions` has run and it was found and planned."""


def rewrite_prefill(
    gm: GraphModule, inputs: Sequence[Tensor], budgets: BudgetPlan, blocks: int, question_rows: int, dumper: Dumper
) -> None:
    """Rewrites a traced prefill in place: merges, attention with scores, eviction.

    Args:
        gm: Of `traced_prefill`.
        inputs: Its example inputs.
        budgets: The capacities.
        blocks: How many blocks the rows of attention are walked in.
        question_rows: The most tokens of a question.
        dumper: Writes the graph before and after each step.

    Raises:
        UnsupportedGraphError: It holds something that static shapes do not allow.
    """
    rewrite = _begin(gm, inputs, frozenset(), budgets)
    _check(rewrite.plan, "prefill", budgets.num_layers)
    check_causal(gm, rewrite.plan, inputs)
    rewrite.plan = dataclasses.replace(rewrite.plan, additions=find_additions(gm))
    mask = next(iter(gm.graph.find_nodes(op="placeholder", target=MASK)))
    rewrite.leave(StaticPrefill(budgets.capacities, budgets.max_new_tokens, blocks, question_rows, mask))
    _run(rewrite, dumper)


def rewrite_decode(gm: GraphModule, inputs: Sequence[Tensor], budgets: BudgetPlan, dumper: Dumper) -> dict[str, Tensor]:
    """Rewrites a traced decode step in place.

    Args:
        gm: Of `traced_decode`.
        inputs: Its example inputs.
        budgets: The capacities.
        dumper: Writes the graph before and after each step.

    Returns:
        An empty cache, by the names of the new inputs.

    Raises:
        UnsupportedGraphError: It is not a decode step of so many layers.
    """
    pasts = [node.name for node in gm.graph.find_nodes(op="placeholder") if node.name.startswith("past_")]
    rewrite = _begin(gm, inputs, frozenset(pasts), budgets)
    _check(rewrite.plan, "decode", budgets.num_layers)
    check_sees_all(gm, rewrite.plan, inputs)
    state = _empty_state(rewrite.plan, budgets)
    fake_mode = rewrite.environment.fake_mode
    rewrite.leave(StaticDecode({name: fake_mode.from_tensor(value) for name, value in state.items()}))
    _run(rewrite, dumper)
    return state


def _run(rewrite: Rewrite, dumper: Dumper) -> None:
    dumper.graph(rewrite.gm, rewrite.plan.kind, "traced")
    run_steps(rewrite, STEPS[rewrite.plan.kind], dumper=dumper)


def _begin(gm: GraphModule, inputs: Sequence[Tensor], compressed: frozenset[str], budgets: BudgetPlan) -> Rewrite:
    """A graph from `torch.export`, planned, in a shape environment of its own."""
    drop_assertions(gm)
    environment = Environment()
    environment.adopt(gm, list(inputs))
    verify(gm, after="drop_assertions")
    return Rewrite(gm, environment, plan_of(gm, compressed), budgets.eviction)


def _check(found: GraphPlan, kind: GraphKind, layers: int) -> None:
    if found.kind != kind:
        misses = f"\n{render_misses(found.misses)}" if found.misses else ""
        raise UnsupportedGraphError(f"the exported graph should be a {kind}, and is {found.kind}: {found.reason}{misses}")
    if found.num_layers != layers:
        raise UnsupportedGraphError(
            f"the model has {found.num_layers} layers that evict, the budget plan has capacities for {layers}; make a plan for "
            "this model"
        )


def _empty_state(found: GraphPlan, plan: BudgetPlan) -> dict[str, Tensor]:
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
