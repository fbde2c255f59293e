from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.decoder import (
    Decoder,
    additive,
    calls,
    capture,
    causal,
    features,
    flag,
    full_cache,
    masked,
    pasts,
    render,
    rewritten,
    tokens,
    values,
    written_out,
)
from tgvkv_compile.fx.verify import verify

BOOL = causal(2, 19, left=3)
FORMS: list[Any] = [
    pytest.param(flag, None, id="flag"),
    pytest.param(masked, causal(2, 19), id="masked"),
    pytest.param(masked, BOOL, id="masked-padded"),
    pytest.param(masked, additive(BOOL), id="masked-additive"),
    pytest.param(written_out, None, id="written-out"),
    pytest.param(written_out, additive(BOOL), id="written-out-padded"),
]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("form", "mask"), FORMS)
def test_every_form_becomes_one_operation(form: Any, mask: Tensor | None, kv_heads: int) -> None:
    gm, inputs = capture(Decoder(form, kv_heads=kv_heads), tokens(2), features(2), None, mask)
    before, called = values(gm, inputs), calls(gm)
    result = rewritten(gm, inputs, "normalise_attention")
    assert [site.form for site in result.plan.sites] == ["sdpa", "sdpa"]
    now = calls(result.gm)
    assert now.count("scaled_dot_product_attention_with_lse") == 2
    assert not {"softmax", "matmul", "scaled_dot_product_attention"} & set(now)
    assert calls(gm) == called  # the graph it was given is as it was
    after = values(result.gm, inputs)
    for old, new in zip(before["output"], after["output"], strict=True):
        # Rows of padding see nothing: what they hold is nobody's business.
        old, new = (x[:, 3:] if x.ndim == 3 else x[:, :, 3:] for x in (old, new))
        torch.testing.assert_close(new, old)
    verify(result.gm, after="test")


@pytest.mark.parametrize(("form", "mask"), FORMS)
def test_the_log_sum_exp_of_the_rows(form: Any, mask: Tensor | None) -> None:
    gm, inputs = capture(Decoder(form), tokens(2), features(2), None, mask)
    result = rewritten(gm, inputs, "normalise_attention")
    got = values(result.gm, inputs)
    everything = torch.ones(2, 1, 19, 19, dtype=torch.bool)
    seen = mask if mask is not None and mask.dtype == torch.bool else mask == 0 if mask is not None else everything
    if form is flag:
        seen = causal(2, 19)
    for site in result.plan.sites:
        assert site.lse is not None
        keys = got[site.key.node.name].repeat_interleave(2, dim=1)
        logits = got[site.query.name] @ keys.transpose(2, 3) * 0.5
        expected = logits.masked_fill(~seen, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(got[site.lse.name][:, :, 3:], expected[:, :, 3:])


def test_new_nodes_know_where_they_come_from() -> None:
    gm, inputs = capture(Decoder(), tokens(), features())
    site = rewritten(gm, inputs, "normalise_attention").plan.sites[1]
    assert "scaled_dot_product_attention" in site.node.meta["stack_trace"]
    assert "decoder.py" in site.node.meta["stack_trace"] and site.node.meta["nn_module_stack"]


@pytest.mark.parametrize("form", [masked, written_out])
def test_golden(form: Any) -> None:
    """Both forms give the same nodes."""
    gm, inputs = capture(Decoder(form, layers=1), tokens(), features(), None, additive(causal(1, 19)))
    assert_expected_inline(
        render(rewritten(gm, inputs, "normalise_attention").gm),
        """\
%tgvkv_attention_0 : AttentionWithLse = scaled_dot_product_attention_with_lse(%q, %keys, %values, %l_mask_, False, 0.5)
%tgvkv_output_0 : f32[1, 4, 19, 4] = getitem(%tgvkv_attention_0, 0)
%tgvkv_lse_0 : f32[1, 4, 19] = getitem(%tgvkv_attention_0, 1)""",
    )


def test_only_prefill_is_normalised() -> None:
    gm, inputs = capture(Decoder(written_out), tokens()[:, :1], None, full_cache(7))
    for compressed in (frozenset(), pasts(gm)):
        assert "scaled_dot_product_attention_with_lse" not in calls(rewritten(gm, inputs, compressed=compressed).gm)
