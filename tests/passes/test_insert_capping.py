from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.decoder import (
    SLOTS,
    Decoder,
    additive,
    calls,
    capture,
    causal,
    features,
    flag,
    masked,
    render,
    rewritten,
    tokens,
    values,
    written_out,
)
from tgvkv_compile.config import EvictionConfig

FORMS: list[Any] = [
    pytest.param(flag, None, id="flag"),
    pytest.param(masked, causal(2, 19, left=3), id="padded"),
    pytest.param(written_out, additive(causal(2, 19, left=3)), id="written-out"),
]


@pytest.mark.parametrize(("form", "mask"), FORMS)
def test_a_cap_that_no_layer_meets_changes_nothing(form: Any, mask: Tensor | None) -> None:
    gm, inputs = capture(Decoder(form), tokens(2), features(2), None, mask)
    plain = values(rewritten(gm, inputs).gm, [*inputs, SLOTS])["output"]
    got = values(rewritten(gm, inputs, prefill_cap=2.0).gm, [*inputs, SLOTS])
    assert got["tgvkv_capped_0"].key.shape == (2, 2, 16, 4)
    assert all(got["tgvkv_budgets"].kept.flatten() <= 16)
    for found, wanted in zip(got["output"], plain, strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


def test_a_layer_that_wants_more_keeps_its_best() -> None:
    decoder = Decoder()
    decoder.layers[0].q.weight.data.mul_(40.0)  # its question looks at few tokens, so that the layers share unevenly
    gm, inputs = capture(decoder, tokens(2), features(2))
    config = EvictionConfig(0.5)
    plain = values(rewritten(gm, inputs, config=config).gm, [*inputs, SLOTS])
    got = values(rewritten(gm, inputs, config=config, prefill_cap=1.0).gm, [*inputs, SLOTS])
    wanted, count = plain["tgvkv_budgets"].kept, 10
    assert int(wanted.max()) > count, "choose a smaller cap"
    for layer in range(2):
        kept = got[f"tgvkv_keep_{layer}"].sum(1)
        assert torch.equal(kept, wanted[:, layer].clamp(max=count))


def test_operations() -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(), features())
    assert "cap_layer" not in calls(rewritten(gm, inputs).gm)
    called = calls(rewritten(gm, inputs, prefill_cap=1.5).gm)
    assert called.count("cap_layer") == 3
    # A layer is capped before the next one's attention.
    order = [name for name in called if name in ("cap_layer", "scaled_dot_product_attention_with_lse")]
    assert order == ["scaled_dot_product_attention_with_lse", "cap_layer"] * 3


def test_no_kv_is_read_behind_its_layer() -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(), features())
    result = rewritten(gm, inputs, prefill_cap=1.5)
    nodes = list(result.gm.graph.nodes)
    last = nodes.index(next(node for node in nodes if node.name == "tgvkv_capped_2"))
    for site in result.plan.sites:
        assert max(nodes.index(user) for user in site.key.node.users) <= last
        assert max(nodes.index(user) for user in site.value.node.users) <= last


def test_golden() -> None:
    gm, inputs = capture(Decoder(layers=1), tokens(), features())
    before = set(render(rewritten(gm, inputs, "insert_scoring").gm).splitlines())
    after = render(rewritten(gm, inputs, "insert_capping", prefill_cap=1.5).gm)
    assert_expected_inline(
        "\n".join(line for line in after.splitlines() if line not in before),
        """\
%tgvkv_capped_0 : Capped = cap_layer(%keys, %values, %tgvkv_score_0, %tgvkv_tier_0, %tgvkv_types, 1.5, 0.4, 4)
%tgvkv_capped_key_0 : f32[1, 2, 12, 4] = getitem(%tgvkv_capped_0, 0)
%tgvkv_capped_value_0 : f32[1, 2, 12, 4] = getitem(%tgvkv_capped_0, 1)
%tgvkv_capped_score_0 : f32[1, 12] = getitem(%tgvkv_capped_0, 2)
%tgvkv_capped_tier_0 : i64[1, 12] = getitem(%tgvkv_capped_0, 3)
%tgvkv_capped_token_types_0 : TokenTypes = getitem(%tgvkv_capped_0, 4)""",
    )
