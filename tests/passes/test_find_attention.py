from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.passes.decoder import (
    Decoder,
    Layer,
    additive,
    capture,
    causal,
    features,
    flag,
    full_cache,
    linear,
    masked,
    returned,
    softcapped,
    tokens,
    written_out,
)
from tgvkv_compile.passes.find.find_appends import find_appends
from tgvkv_compile.passes.find.find_attention import find_attention
from tgvkv_compile.plan import AttentionSite, Miss


def find(gm: GraphModule) -> tuple[tuple[AttentionSite, ...], tuple[Miss, ...]]:
    return find_attention(gm, find_appends(gm)[0])


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1)])


def check(sites: tuple[AttentionSite, ...], gm: GraphModule) -> None:
    appends, _ = find_appends(gm)
    assert [(site.key, site.value) for site in sites] == [(appends[0], appends[1]), (appends[2], appends[3])]
    for site in sites:
        assert site.query.meta["example_value"].shape[1] == 4
        assert site.node.meta["example_value"].shape == site.query.meta["example_value"].shape
        assert site.scale == pytest.approx(0.5)


@HEADS
@pytest.mark.parametrize("past", [False, True])
def test_flag(heads: int, kv_heads: int, past: bool) -> None:
    call = (tokens()[:, :1], None, full_cache(7, kv_heads=kv_heads)) if past else (tokens(), features())
    gm, _ = capture(Decoder(flag, heads=heads, kv_heads=kv_heads), *call)
    sites, misses = find(gm)
    assert misses == ()
    check(sites, gm)
    assert all(site.form == "sdpa" and site.mask is None and site.is_causal is not past for site in sites)


@HEADS
@pytest.mark.parametrize("past", [False, True])
def test_masked_with_repeated_heads(heads: int, kv_heads: int, past: bool) -> None:
    cache = full_cache(7, kv_heads=kv_heads) if past else None
    mask = causal(1, 19, past=7 if past else 0)
    gm, _ = capture(Decoder(masked, heads=heads, kv_heads=kv_heads), tokens(), features(), cache, mask)
    sites, misses = find(gm)
    assert misses == ()
    check(sites, gm)
    assert all(site.form == "sdpa" and not site.is_causal for site in sites)
    assert {site.mask.name for site in sites} == {"l_mask_"}


@HEADS
@pytest.mark.parametrize("mask", [None, additive(causal(1, 19))])
def test_written_out(heads: int, kv_heads: int, mask: Tensor | None) -> None:
    gm, _ = capture(Decoder(written_out, heads=heads, kv_heads=kv_heads), tokens(), features(), None, mask)
    sites, misses = find(gm)
    assert misses == ()
    check(sites, gm)
    assert all(site.form == "eager" and (site.mask is None) == (mask is None) for site in sites)


class _Divided(Layer):
    """`q @ k^T / sqrt(d) + mask`, softmax as a method, `@`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attend = lambda q, k, v, mask, layer: ((q @ k.transpose(-1, -2) / 2.0) + mask).softmax(-1) @ v


def test_written_out_another_way() -> None:
    model = Decoder(heads=4, kv_heads=4, kind=_Divided)
    gm, _ = capture(model, tokens(), features(), None, additive(causal(1, 19)))
    sites, misses = find(gm)
    assert misses == ()
    check(sites, gm)


class _Tower(nn.Module):
    """Attention that has no cache, as in vision towers, before a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, ids: Tensor, pictures: Tensor) -> Any:
        q = pictures.view(1, 8, 4, 4).transpose(1, 2)
        joined = torch.cat([q, q], dim=-2)
        seen = nn.functional.scaled_dot_product_attention(q, joined, joined).transpose(1, 2).reshape(8, 16)
        weights = torch.softmax(torch.matmul(q, q.transpose(2, 3)), dim=-1)
        return self.decoder(ids, seen + torch.matmul(weights, q).reshape(8, 16))


def test_attention_of_a_vision_tower_is_no_site() -> None:
    gm, _ = capture(_Tower(), tokens(), features())
    sites, misses = find(gm)
    assert misses == ()
    check(sites, gm)


def test_softcapping_is_a_miss_that_names_the_tanh() -> None:
    gm, _ = capture(Decoder(softcapped), tokens(), features())
    sites, misses = find(gm)
    assert sites == () and misses
    assert all(miss.target == "tanh" for miss in misses), misses
    assert len(misses) == 2
    assert all("softmax" in miss.reason for miss in misses)
    assert all("decoder.py:" in miss.source and "torch.tanh(weights / 50.0)" in miss.source for miss in misses)


def test_returned_probabilities_are_a_miss() -> None:
    gm, _ = capture(Decoder(returned, probabilities=True), tokens(), features())
    sites, misses = find(gm)
    assert sites == () and len(misses) == 2
    for miss in misses:
        assert "output_attentions" in miss.reason
        assert miss.target == "softmax" and "nn.functional.softmax(weights, dim=-1)" in miss.source


def test_attention_without_softmax_is_a_miss_at_its_first_operation() -> None:
    gm, _ = capture(Decoder(linear, layers=1), tokens(), features())
    sites, misses = find(gm)
    assert sites == ()
    assert [miss.target for miss in misses] == ["matmul", "matmul"]
    assert all("unknown attention form" in miss.reason and "torch.matmul(" in miss.source for miss in misses)


def test_dropout_is_a_miss_with_its_remedy() -> None:
    model = Decoder(written_out, dropout=0.5).train()
    gm, _ = capture(model, tokens(), features())
    sites, misses = find(gm)
    assert sites == () and [miss.target for miss in misses] == ["dropout", "dropout"]
    assert all("model.eval()" in miss.reason and "decoder.py:" in miss.source for miss in misses)

    def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)

    gm, _ = capture(Decoder(dropping), tokens(), features())
    sites, misses = find(gm)
    assert sites == () and [miss.target for miss in misses] == ["scaled_dot_product_attention"] * 2
    assert all("model.eval()" in miss.reason for miss in misses)


def test_keys_and_values_shared_by_two_attentions_are_a_miss() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
        return flag(q, k, v, mask, layer) + flag(q * 2, k, v, mask, layer)

    gm, _ = capture(Decoder(twice, layers=1), tokens(), features())
    _, misses = find(gm)
    assert [miss.target for miss in misses] == ["cat", "cat"]
    assert all("2 attentions share" in miss.reason for miss in misses)


def test_probabilities_times_something_else_are_a_miss() -> None:
    def strange(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1), v * 2)

    gm, _ = capture(Decoder(strange, kv_heads=4, layers=1), tokens(), features())
    sites, misses = find(gm)
    assert sites == () and misses[0].target == "matmul"
    assert "not multiplied with the values" in misses[0].reason


def test_other_graphs_hold_nothing() -> None:
    gm, _ = capture(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), torch.ones(2, 3))
    assert find(gm) == ((), ())
