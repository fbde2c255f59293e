"""The finders on what `torch.export` makes: aten operations, `meta["val"]`, outputs in the order of the signature."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tests.passes.decoder import (
    Decoder,
    additive,
    causal,
    features,
    flag,
    full_cache,
    masked,
    returned,
    softcapped,
    tokens,
    written_out,
)
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.passes.find.find_appends import find_appends
from tgvkv_compile.passes.find.find_attention import find_attention
from tgvkv_compile.passes.find.find_embedding import find_embedding
from tgvkv_compile.passes.find.find_modality import find_modality
from tgvkv_compile.passes.plan_graph import plan_graph
from tgvkv_compile.plan import GraphPlan


class _Flat(Decoder):
    """Keys and values as they come: exported programs return tensors."""

    def forward(self, *args: Any) -> Any:
        logits, caches = super().forward(*args)[:2]
        return logits, [tensor for pair in caches for tensor in pair]


def export(model: Decoder, *call: Any, strict: bool = False, decompose: bool = False) -> GraphModule:
    with torch.no_grad():
        program = torch.export.export(model, call, strict=strict)
    if decompose:
        program = program.run_decompositions({})
    return program.graph_module


def planned(gm: GraphModule) -> tuple[GraphPlan, int]:
    appends, misses = find_appends(gm)
    sites, more = find_attention(gm, appends)
    pasts = frozenset(append.past.name for append in appends if append.past is not None)
    embedding = find_embedding(gm, appends)
    assert embedding is not None
    plan = plan_graph(appends, sites, find_modality(gm), misses + more, compressed=pasts, embedding=embedding)
    return plan, len(appends)


BOTH = pytest.mark.parametrize("strict", [False, True])
DECOMPOSED = pytest.mark.parametrize("decompose", [False, True])
FORMS: list[Any] = [
    pytest.param(flag, None, "sdpa", id="flag"),
    pytest.param(masked, causal(1, 19), "sdpa", id="masked"),
    pytest.param(written_out, additive(causal(1, 19)), "eager", id="written-out"),
]


@BOTH
@DECOMPOSED
@pytest.mark.parametrize(("form", "mask", "name"), FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_prefill(form: Any, mask: Tensor | None, name: str, kv_heads: int, strict: bool, decompose: bool) -> None:
    model = _Flat(form, kv_heads=kv_heads)
    gm = export(model, tokens(), features(), None, mask, strict=strict, decompose=decompose)
    assert all(node.op != "call_method" for node in gm.graph.nodes)
    plan, appends = planned(gm)
    assert (plan.kind, plan.num_layers, plan.misses, appends) == ("prefill", 2, (), 4)
    for layer, site in enumerate(plan.sites):
        assert site.form == name and site.scale == pytest.approx(0.5)
        assert (site.mask is None) == (mask is None) and site.is_causal == (form is flag)
        assert site.key.past is None and site.query.meta["val"].shape == (1, 4, 19, 4)
        assert output_nodes(gm)[site.key.output] is site.key.node
        assert [site.key.output, site.value.output] == [1 + 2 * layer, 2 + 2 * layer]
    assert plan.modality is not None and plan.modality.masks[0].meta["val"].shape == (1, 19, 1)


@BOTH
@pytest.mark.parametrize("queries", [1, 5])
def test_on_a_cache(queries: int, strict: bool) -> None:
    mask = causal(1, queries, past=7)
    gm = export(_Flat(masked), tokens()[:, :queries], None, full_cache(7), mask, strict=strict)
    plan, appends = planned(gm)
    assert (plan.kind, plan.num_layers, plan.misses, appends) == (
        "decode" if queries == 1 else "continuation", 2, (), 4
    )  # fmt: skip
    assert all(site.key.past is not None and site.key.past.op == "placeholder" for site in plan.sites)


def test_misses() -> None:
    gm = export(_Flat(softcapped), tokens(), features())
    plan, _ = planned(gm)
    assert [miss.target for miss in plan.misses] == ["tanh.default", "tanh.default"]
    assert all("decoder.py" in miss.source for miss in plan.misses)
    plan, _ = planned(export(Decoder(returned, probabilities=True), tokens(), features()))
    assert len(plan.misses) == 2 and all("output_attentions" in miss.reason for miss in plan.misses)
