"""How large the arena of a call is to be, as far as that is known before its graph has run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt
from torch.fx import GraphModule

from tgvkv_compile.backend.analysis import Analysis
from tgvkv_compile.backend.options import BackendOptions
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.pipeline import vision_counter
from tgvkv_compile.runtime.compact import arena_slots
from tgvkv_compile.runtime.logical import LogicalKV


def counter_of(graph: Analysis, options: BackendOptions) -> GraphModule | None:
    """What counts the vision tokens of a prefill, where its arena's size depends on them (`budget_of="vision"`)."""
    needed = graph.plan.kind == "prefill" and options.eviction.budget_of == "vision"
    return vision_counter(graph.gm, graph.sizes, options.eviction) if needed else None


def fewest_vision(counter: GraphModule | None, inputs: Sequence[Any]) -> int | None:
    """Fewest vision tokens of a sample, where the arena's size depends on it (`budget_of="vision"`).

    Args:
        counter: From `vision_counter`, or None where that does not matter.
        inputs: Of a call, or example inputs from dynamo, where sizes may be symbolic.
    """
    if counter is None:
        return None
    inputs = [value.node.hint if isinstance(value, torch.SymInt) else value for value in inputs]
    with torch.no_grad():
        (count,) = counter(*inputs)
    return int(count.min())


def slots_of_example(graph: Analysis, options: BackendOptions, num_vision: int | None) -> int:
    """T of the example call: of the arena that a prefill would make, or of the one behind the handles; else 0.

    Args:
        graph: The graph.
        options: Of the backend.
        num_vision: Of `fewest_vision`.
    """
    for value in graph.inputs:
        if isinstance(value, LogicalKV):
            return value.compact.state.key_arena.shape[2]
    plan = graph.plan
    if plan.kind != "prefill":
        return 0
    size = fake_tensor(plan.sites[0].key.node).shape[2]
    length = int(size.node.hint) if isinstance(size, SymInt) else size  # int(size) would compile for this length alone
    return arena_slots(plan.num_layers, length, options.growth_reserve, config=options.eviction, num_vision=num_vision)
