"""Insert budgeting: across layers, how many entries each layer keeps."""

from torch.fx import GraphModule

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.ops.packing import allocate_layers, allocated_by
from tgvkv_compile.passes.inserted import Budgets, Scores
from tgvkv_compile.passes.told import told
from tgvkv_compile.plan import Plan


def insert_budgeting(gm: GraphModule, plan: Plan, scores: Scores, config: EvictionConfig) -> Budgets:
    """Adds one call, after the last layer's scores.

    Before::

        %tgvkv_mass_0 : f32[B] ... %tgvkv_mass_{L-1} : f32[B]

    After::

        %tgvkv_budgets : (i64[B, L], f32[B, L]) = allocate_layers((%tgvkv_mass_0, ...), %tgvkv_roles, budget=...)

    Requires: `insert_scoring` ran. Ensures: one allocation for the whole graph.
    """
    options = config.constants()
    function = allocated_by(allocate_layers, config.budgeting)
    with gm.graph.inserting_after(scores.tier[-1]), told("budgeting", config.budgeting):
        allocation = insert_call(gm, function, scores.mass, scores.roles, name="tgvkv_budgets", **options)
    return Budgets(allocation)
