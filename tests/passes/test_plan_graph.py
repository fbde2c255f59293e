from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from tests.passes.decoder import (
    Decoder,
    Layer,
    SlidingLayer,
    capture,
    causal,
    features,
    flag,
    full_cache,
    masked,
    pasts,
    softcapped,
    tokens,
    written_out,
)
from tgvkv_compile.pipeline import plan_of
from tgvkv_compile.plan import GraphPlan

NONE: frozenset[str] = frozenset()


def planned(model: torch.nn.Module, *call: Any, compressed: bool = False) -> tuple[GraphPlan, GraphModule]:
    gm, _ = capture(model, *call)
    return plan_of(gm, pasts(gm) if compressed else NONE), gm


def test_prefill() -> None:
    plan, _ = planned(Decoder(layers=3), tokens(), features())
    assert (plan.kind, plan.num_layers, plan.misses) == ("prefill", 3, ())
    assert plan.modality is not None


def test_decode_and_continuation() -> None:
    plan, _ = planned(Decoder(), tokens()[:, :1], None, full_cache(7), compressed=True)
    assert (plan.kind, plan.num_layers, plan.misses) == ("decode", 2, ())
    plan, _ = planned(Decoder(masked), tokens()[:, :6], None, full_cache(7), causal(1, 6, past=7), compressed=True)
    assert (plan.kind, plan.num_layers, plan.misses) == ("continuation", 2, ())


def test_what_is_not_ours_stays_dense() -> None:
    plan, _ = planned(Decoder(), tokens()[:, :6])
    assert (plan.kind, plan.misses) == ("dense", ()) and "text-only" in plan.reason and plan.num_layers == 2
    plan, _ = planned(Decoder(), tokens()[:, :1], None, full_cache(7))
    assert (plan.kind, plan.misses) == ("dense", ()) and "uncompressed cache" in plan.reason
    plan, _ = planned(torch.nn.Linear(3, 3), torch.ones(1, 3))
    assert (plan.kind, plan.misses) == ("dense", ()) and "no KV append" in plan.reason
    plan, _ = planned(Decoder(softcapped), tokens()[:, :6])
    assert (plan.kind, plan.misses) == ("dense", ())  # an unknown form matters only where something is to be evicted


def test_embeddings_without_tokens_are_a_miss() -> None:
    """A text-only prompt, for all that can be seen; but vision may have been merged before."""
    model = Decoder()
    model.embed = torch.nn.Identity()
    plan, _ = planned(model, torch.randn(1, 6, 16))
    assert plan.kind == "dense" and "handed embeddings, not tokens" in plan.misses[0].reason
    plan, _ = planned(model, torch.randn(1, 1, 16), None, full_cache(7))
    assert (plan.kind, plan.misses) == ("dense", ())  # goes on with a cache that was not compressed


def test_a_later_turn_whose_order_attention_does_not_keep_is_a_miss() -> None:
    """The rewritten turn is causal where there is no mask."""
    for attend, ids, picture in ((unmasked, tokens()[:, :6], None), (written_out, tokens(), features())):
        model = Decoder(attend)
        plan, _ = planned(model, ids, picture, full_cache(7), compressed=True)
        assert plan.kind == "dense" and len(plan.misses) == 2
        assert all("without a mask and not causally" in miss.reason for miss in plan.misses)
        plan, _ = planned(model, ids[:, :1], None, full_cache(7), compressed=True)
        assert (plan.kind, plan.misses) == ("decode", ())  # one token sees all there is


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, layer: Layer) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=layer.scale, enable_gqa=True)


class _CrossLayer(Layer):
    """Attends to three tokens that are not the prompt's."""

    def store(self, past: Any, k: torch.Tensor, v: torch.Tensor) -> Any:
        return super().store(past, k[:, :, :3], v[:, :, :3])


def test_cross_attention_is_a_miss() -> None:
    plan, _ = planned(Decoder(masked, kind=(Layer, _CrossLayer)), tokens()[:, :6], None, None, None)
    assert plan.kind == "dense" and len(plan.misses) == 2
    assert all("are 3 tokens where the first layer's are 6: cross-attention" in miss.reason for miss in plan.misses)


class _Uncached(Decoder):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0]


def test_vision_without_a_cache_stays_dense() -> None:
    plan, _ = planned(_Uncached(), tokens(), features())
    assert (plan.kind, plan.misses) == ("dense", ()) and "use_cache=False" in plan.reason
    assert plan.modality is not None


def test_an_unknown_form_is_named() -> None:
    plan, _ = planned(Decoder(softcapped), tokens(), features())
    assert plan.kind == "dense" and plan.reason == "the decoder cannot be rewritten"
    assert [miss.target for miss in plan.misses] == ["tanh", "tanh"]


def test_a_new_picture_on_a_cache() -> None:
    call = (tokens(), features(), full_cache(7), causal(1, 19, past=7))
    plan, _ = planned(Decoder(masked), *call, compressed=True)
    assert (plan.kind, plan.num_layers, plan.misses) == ("vision_continuation", 2, ())
    assert plan.modality is not None
    plan, _ = planned(Decoder(masked), *call)
    assert (plan.kind, plan.num_layers, plan.misses) == ("late_prefill", 2, ())


def test_half_a_compressed_cache_is_a_miss() -> None:
    gm, _ = capture(Decoder(), tokens()[:, :1], None, full_cache(7))
    plan = plan_of(gm, frozenset({"l_past_0_0_", "l_past_0_1_"}))
    assert plan.kind == "dense" and "some layers of the cache are compressed and some are not" in plan.misses[0].reason


@pytest.mark.parametrize("vision", [True, False])
def test_handles_that_nothing_appends_to_are_a_miss(vision: bool) -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder()

        def forward(self, ids: torch.Tensor, pictures: torch.Tensor, past: Any) -> Any:
            total = past[0][0].sum()
            return self.decoder(ids, pictures), total if vision else total * pictures.sum()

    if vision:
        gm, _ = capture(Reader(), tokens(), features(), full_cache(7))
    else:
        gm, _ = capture(Sum(), full_cache(7))
    compressed = pasts(gm)
    assert len(compressed) == 1
    plan = plan_of(gm, compressed)
    assert plan.kind == "dense"
    assert [miss.node for miss in plan.misses] == ["l_past_0_0_"]
    assert "other than by a KV append" in plan.misses[0].reason
    assert (plan_of(gm, NONE).kind == "prefill") == vision


class Sum(torch.nn.Module):
    def forward(self, past: Any) -> Any:
        return past[0][0].sum()


class _Narrow(Layer):
    def __init__(self, attend: Any, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__(attend, heads, kv_heads // 2, dropout)


def test_layers_that_differ_are_a_miss() -> None:
    plan, _ = planned(Decoder(flag, kind=(Layer, _Narrow)), tokens(), features())
    assert plan.kind == "dense" and len(plan.misses) == 2
    assert all("differ between layers" in miss.reason and "(2, 4, torch.float32" in miss.reason for miss in plan.misses)


class _NarrowValues(Layer):
    """Half as many numbers in a value as in a key."""

    def store(self, past: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor) -> Any:
        half = v.shape[3] // 2
        return torch.cat([past[0], k], dim=-2), torch.cat([past[1][..., :half], v[..., :half]], dim=-2)


def _widened(*call: Any) -> torch.Tensor:
    return flag(*call).repeat(1, 1, 1, 2)


def test_values_of_another_head_dim_than_the_keys_are_a_miss() -> None:
    plan, _ = planned(Decoder(_widened, kind=_NarrowValues), tokens(), features())
    assert plan.kind == "dense" and len(plan.misses) == 2
    assert all("its head dim is 2, the keys' is 4" in miss.reason for miss in plan.misses)


class _Moving(Layer):
    """On another device than its input; what it computes comes back."""

    def forward(self, hidden: torch.Tensor, past: Any, mask: Any) -> Any:
        out, keys, values = super().forward(hidden.to("meta"), tuple(part.to("meta") for part in past), mask)
        return torch.empty_like(out, device=hidden.device), keys, values


def test_layers_on_several_devices_are_a_miss() -> None:
    model = Decoder(flag, kind=(Layer, _Moving))
    model.layers[1].to("meta")
    plan, _ = planned(model, tokens(), features())
    assert plan.kind == "dense" and len(plan.misses) == 2
    for miss in plan.misses:
        assert "this layer's KV cache is on meta, the first layer's on cpu" in miss.reason
        assert "Put all decoder layers on one device (device_map='cpu')" in miss.reason


def test_sliding_layers_do_not_count() -> None:
    plan, _ = planned(Decoder(flag, kind=(SlidingLayer, Layer)), tokens(), features())
    assert (plan.kind, plan.num_layers) == ("prefill", 1)
