from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.passes.decoder import Decoder, Layer, calls, capture, causal, features, flag, full_cache, masked, rewritten, tokens
from tests.passes.decoder import values as values_of
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.passes.find.find_appends import find_appends
from tgvkv_compile.passes.find.find_attention import find_attention
from tgvkv_compile.passes.materialise_masks import materialise_masks
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.pipeline import plan_of


def flexed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer, score_mod: Any = None) -> Tensor:
    """P6: the causal mask as a function; with a mask, the function looks it up."""
    past = k.shape[2] - q.shape[2]

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return column <= row + past

    def looks_up(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        assert mask is not None
        return mask[b, 0, row, column]

    chosen = sees if mask is None else looks_up
    blocks = create_block_mask(chosen, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, scale=layer.scale, enable_gqa=True)  # type: ignore[return-value]


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    return flexed(q, k, v, mask, layer, lambda score, b, h, row, column: torch.tanh(score / 50.0) * 50.0)


def by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    blocks = create_block_mask(lambda b, h, row, column: column <= row + h, 1, 4, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=blocks, scale=layer.scale, enable_gqa=True)  # type: ignore[return-value]


def mask_calls(gm: GraphModule) -> int:
    return calls(gm).count("mask_of_function")


def test_layers_share_a_causal_mask() -> None:
    traced, inputs = capture(Decoder(flexed), tokens(), features())
    plan = plan_of(traced, frozenset())
    assert plan.kind == "prefill" and [site.form for site in plan.sites] == ["flex", "flex"]
    done = rewritten(traced, inputs, "materialise_masks")
    gm, made = done.gm, done.plan
    assert mask_calls(gm) == 1 and all(site.mask is made.sites[0].mask for site in made.sites)
    assert all(site.mask_function is None for site in made.sites)
    mask = made.sites[0].mask
    assert mask is not None and mask.meta["example_value"].shape == (1, 1, 19, 19)
    assert torch.equal(values_of(gm, inputs)[mask.name], causal(1, 19))
    materialise_masks(done)
    assert done.plan == made and mask_calls(gm) == 1


def test_a_mask_with_padding_has_a_row_per_sample() -> None:
    wanted = causal(2, 19, left=3)
    gm, inputs = capture(Decoder(flexed), tokens(2), features(2), None, wanted)
    done = rewritten(gm, inputs, "materialise_masks")
    mask = done.plan.sites[0].mask
    assert mask is not None and mask_calls(done.gm) == 1
    assert torch.equal(values_of(done.gm, inputs)[mask.name], wanted)


def test_a_prefill_keeps_no_flex_attention() -> None:
    """The rewritten graph computes what the one with a mask tensor computes."""
    mask = causal(2, 19, left=3)
    outputs = []
    for attend in (flexed, masked):
        gm, inputs = capture(Decoder(attend), tokens(2), features(2), None, mask)
        done = rewritten(gm, inputs)
        assert "flex_attention" not in calls(done.gm) and all(site.form == "sdpa" for site in done.plan.sites)
        outputs.append([x for x in done.gm(*inputs, 64) if isinstance(x, Tensor)])
    assert len(outputs[0]) == len(outputs[1]) > 5
    for found, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_other_forms_are_left_alone() -> None:
    gm, _ = capture(Decoder(flag), tokens(), features())
    before, plan = gm.code, plan_of(gm, frozenset())
    rewrite = Rewrite(gm, Environment(), plan, EvictionConfig())
    materialise_masks(rewrite)
    assert rewrite.plan == plan
    gm.recompile()
    assert gm.code == before


def test_a_step_with_a_past_is_found() -> None:
    gm, _ = capture(Decoder(flexed), tokens()[:, :1], None, full_cache(7))
    sites, misses = find_attention(gm, find_appends(gm)[0])
    assert misses == () and [site.form for site in sites] == ["flex", "flex"]
    assert all(site.node.meta["example_value"].shape == (1, 4, 1, 4) for site in sites)


@pytest.mark.parametrize(("attend", "reason"), [(capped, "changes the scores"), (by_head, "depends on the head")])
def test_misses(attend: Any, reason: str) -> None:
    gm, _ = capture(Decoder(attend), tokens(), features())
    sites, misses = find_attention(gm, find_appends(gm)[0])
    assert sites == () and len(misses) == 2
    assert all(reason in miss.reason and miss.target == "flex_attention" for miss in misses)
