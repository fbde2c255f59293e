"""The passes of exported graphs, one after the other: what each finds, what it puts in, and that nothing is done twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from tests.families.family import make_inputs, make_model
from tests.families.table import FAMILIES
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.trace.families import engine_inputs, family_of
from tgvkv_compile.export.trace.rewritten import rewrite_prefill
from tgvkv_compile.export.trace.traced import traced_prefill
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.targets import target_name
from tgvkv_compile.passes.drop_assertions import drop_assertions
from tgvkv_compile.passes.find.find_additions import find_additions

PLAN = BudgetPlan((40, 40), 60, 4, EvictionConfig(0.4))


def kinds(gm: GraphModule) -> Counter[str]:
    return Counter(target_name(node) for node in gm.graph.nodes if node.op == "call_function")


@pytest.fixture
def traced() -> tuple[GraphModule, tuple[Any, ...]]:
    """Qwen3-VL has all that these passes are for: a merge, and additions of features in two layers."""
    family = FAMILIES["qwen3_vl"]
    model = make_model(family)
    inputs = engine_inputs(model, family_of(model), make_inputs(family, model, ((6, "image", 9), (4, "image", 5))))
    gm = traced_prefill(model, family_of(model), inputs, {}, [None] * len(inputs))
    return gm, tuple(inputs.values())


def test_assertions_go_once(traced: tuple[GraphModule, tuple[Any, ...]]) -> None:
    gm, inputs = traced
    with torch.no_grad():
        before = gm(*inputs)
        first = next(iter(gm.graph.find_nodes(op="placeholder")))
        with gm.graph.inserting_after(first):
            gm.graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (first,))
        assert drop_assertions(gm) >= 1 and drop_assertions(gm) == 0
        gm.recompile()
        after = gm(*inputs)
    assert not [name for name in kinds(gm) if "assert" in name or name == "item"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_additions_are_found(traced: tuple[GraphModule, tuple[Any, ...]]) -> None:
    gm, _ = traced
    found = find_additions(gm)
    assert len(found) == 2
    for addition in found:
        assert target_name(addition.node) == "index_put.default" and addition.node.args[0] is addition.hidden
        assert addition.features.meta["val"].shape == (16, 32)
    # A miss: what is put back is not a sum with what was picked.
    found[0].node.update_arg(2, found[0].features)
    assert len(find_additions(gm)) == 1


def test_one_step_after_the_other(traced: tuple[GraphModule, tuple[Any, ...]]) -> None:
    gm, inputs = traced
    with torch.no_grad():
        before = gm(*inputs)
    seen: dict[str, Counter[str]] = {}

    class Counts(Dumper):
        def graph(self, gm: GraphModule, kind: str, step: str) -> None:
            assert kind == "prefill"
            seen[step] = kinds(gm)

    rewrite_prefill(gm, inputs, PLAN, 1, 20, Counts(None))
    assert seen["traced"]["scaled_dot_product_attention.default"] == 2 and seen["traced"]["masked_scatter.default"] == 1
    joined = [before_it["cat.default"] for before_it in (seen["traced"], seen["drop_empty_pasts"])]
    assert joined[0] - joined[1] == 4
    gathers = seen["insert_gathers"]
    assert (gathers["merge_features"], gathers["add_features"]) == (1, 2)
    assert not gathers["masked_scatter.default"] and not gathers["index_put.default"]
    scored = seen["insert_fixed_scoring"]
    assert (scored["attend_and_score"], scored["token_types_from_mask"], scored["scaled_dot_product_attention.default"]) == (
        2,
        1,
        0,
    )
    evicted = seen["insert_fixed_eviction"]
    assert (evicted["fit_layers"], evicted["select_in_layers"], evicted["pack_layer"], evicted["static_protected_from"]) == (
        1,
        1,
        2,
        1,
    )
    with torch.no_grad():
        logits, key, _, slots, *_ = gm(*inputs)
    torch.testing.assert_close(logits, before[0], atol=1e-4, rtol=1e-4)
    for sample in range(2):  # what is packed is what was there
        padding = int((inputs[1][sample] == 0).sum())
        for slot, position in enumerate(slots[sample].tolist()):
            if position >= 0:
                torch.testing.assert_close(key[sample, :, slot], before[1][sample, :, padding + position], atol=1e-4, rtol=1e-4)
