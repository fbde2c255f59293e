from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from tests.passes.decoder import (
    Decoder,
    additive,
    calls,
    capture,
    causal,
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
from tests.passes.states import full_state
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.runtime.compact import kept_positions

FORMS: list[Any] = [
    pytest.param(flag, None, id="flag"),
    pytest.param(masked, causal(2, 1, past=7), id="masked"),
    pytest.param(written_out, additive(causal(2, 1, past=7)), id="written-out"),
]


def decode(form: Any, mask: Any, config: EvictionConfig, kv_heads: int = 2) -> tuple[Rewrite, Any, list[Any], Any]:
    cache = full_cache(7, batch=2, kv_heads=kv_heads)
    gm, inputs = capture(Decoder(form, kv_heads=kv_heads), tokens(2)[:, :1], None, cache, mask)
    compressed = pasts(gm)
    result = rewritten(gm, inputs, compressed=compressed, config=config)
    placeholders = gm.graph.find_nodes(op="placeholder")
    rest = [value for node, value in zip(placeholders, inputs, strict=True) if node.name not in compressed]
    return result, gm, [inputs, rest], cache


@pytest.mark.parametrize(("form", "mask"), FORMS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_step_on_everything_is_the_uncompressed_step(form: Any, mask: Any, kv_heads: int) -> None:
    result, gm, (inputs, rest), cache = decode(form, mask, EvictionConfig(1.0), kv_heads)
    expected = values(gm, inputs)["output"]
    state = full_state(cache, slots=40)
    outputs = values(result.gm, [*rest, *state])["output"]
    index = next(i for i, node in enumerate(output_nodes(gm)) if "linear" in node.name)
    torch.testing.assert_close(outputs[index], expected[index])
    assert outputs[-1].tolist() == [8, 8]
    # The new entry stands in the arena, where the model's own cache has it at the end.
    for layer, site in enumerate(result.plan.sites):
        assert kept_positions(state, layer, 1).tolist() == list(range(8))
        start = int(state.segment_start[1, layer])
        full = expected[site.key.output][1]
        torch.testing.assert_close(state.key_arena[1][:, start : start + 8], full)


def test_a_step_evicts_what_the_step_looks_at_least() -> None:
    result, _, (_, rest), cache = decode(flag, None, EvictionConfig(0.5, decode="fixed", sink_tokens=2))
    state = full_state(cache, slots=40, rate=0.5, protect_from=5)
    got = values(result.gm, [*rest, *state])
    for layer, site in enumerate(result.plan.sites):
        query = got[site.query.name]
        for sample in range(2):
            keys = torch.cat([cache[layer][0][sample], got[site.key.new.name][sample]], dim=1)
            logits = query[sample] @ keys.repeat_interleave(2, dim=0).transpose(1, 2) * 0.5
            attention = logits.softmax(-1).mean(0)[0]
            gone = 2 + int(attention[2:6].argmin())
            assert kept_positions(state, layer, sample).tolist() == [p for p in range(8) if p != gone]


def test_operations() -> None:
    result, gm, _, _ = decode(flag, None, EvictionConfig(0.5))
    assert calls(gm).count("scaled_dot_product_attention") == 2 and calls(gm).count("cat") == 4
    called = calls(result.gm)
    assert called.count("decode_step") == 2 and called.count("advance_lengths") == 1
    assert "scaled_dot_product_attention" not in called and "cat" not in called
    assert not pasts(result.gm)
    assert [node is None for node in output_nodes(result.gm)].count(True) == 4


def test_golden() -> None:
    gm, inputs = capture(Decoder(layers=1), tokens()[:, :1], None, full_cache(7, layers=1))
    result = rewritten(gm, inputs, compressed=pasts(gm))
    assert_expected_inline(
        render(result.gm),
        """\
%tgvkv_key_arena : f32[1, 2, sym, 4] = placeholder
%tgvkv_value_arena : f32[1, 2, sym, 4] = placeholder
%tgvkv_slot_position : i32[1, sym] = placeholder
%tgvkv_segment_start : i64[1, 1] = placeholder
%tgvkv_segment_len : i64[1, 1] = placeholder
%tgvkv_next_slot : i64[1, 1] = placeholder
%tgvkv_protect_from : i64[1, 1] = placeholder
%tgvkv_keep_rate : f32[1, 1] = placeholder
%tgvkv_lengths : i64[1] = placeholder
%tgvkv_out_0 : f32[1, 4, 1, 4] = decode_step(%q, %k, %v, (%tgvkv_key_arena, %tgvkv_value_arena, %tgvkv_slot_position, %tgvkv_segment_start, %tgvkv_segment_len, %tgvkv_next_slot, %tgvkv_protect_from, %tgvkv_keep_rate, %tgvkv_lengths), layer=0, scale=0.5, decode='ratio', sink_tokens=4)
%tgvkv_lengths_next : i64[1] = advance_lengths(%tgvkv_lengths, None, %k)""",
    )


def test_an_uncompressed_cache_is_left_alone() -> None:
    gm, inputs = capture(Decoder(), tokens()[:, :1], None, full_cache(7))
    assert calls(rewritten(gm, inputs).gm) == [name for name in calls(gm)]


def test_a_past_that_something_else_reads_is_an_error() -> None:
    class Peeking(Decoder):
        def forward(self, ids: Any, features: Any, past: Any, mask: Any) -> Any:
            return super().forward(ids, features, past, mask), past[0][0].sum()

    gm, inputs = capture(Peeking(), tokens()[:, :1], None, full_cache(7), None)
    with pytest.raises(InternalError, match="the past %l_past_0_0_ is still read by %"):
        rewritten(gm, inputs, compressed=pasts(gm))
