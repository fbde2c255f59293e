"""Insert budgeting: across layers, how many entries each layer keeps."""

from tgvkv_compile.fx.insert import insert_call
from tgvkv_compile.ops.cache.packing import allocate_layers, allocated_by
from tgvkv_compile.passes.inserted import Budgets, Scores
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.passes.told import told


def insert_budgeting(rewrite: Rewrite) -> None:
    """Adds one call, after the last layer's scores.

    Before::

        %tgvkv_mass_0 : f32[B] ... %tgvkv_mass_{L-1} : f32[B]

    After::

        %tgvkv_budgets : (i64[B, L], f32[B, L]) = allocate_layers((%tgvkv_mass_0, ...), %tgvkv_types, budget=...)

    Requires: `insert_scoring` ran. Ensures: one allocation for the whole graph.
    """
    config, scores = rewrite.config, rewrite.get(Scores)
    function = allocated_by(allocate_layers, config.budgeting)
    with rewrite.gm.graph.inserting_after(scores.tier[-1]), told("budgeting", config.budgeting):
        given = (scores.mass, scores.token_types)
        allocation = insert_call(rewrite.gm, function, *given, name="tgvkv_budgets", **config.constants())
    rewrite.leave(Budgets(allocation))
