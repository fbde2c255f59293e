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
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.runtime.compact import kept_positions


@pytest.mark.parametrize("form", [masked, written_out])
@pytest.mark.parametrize("left", [0, 2])
def test_a_turn_on_everything_is_the_uncompressed_turn(form: Any, left: int) -> None:
    cache = full_cache(7, batch=2)
    mask = causal(2, 5, past=7)
    mask[0, :, :, 7 : 7 + left] = False  # the new turn of sample 0 is padded on the left
    given = mask if form is masked else additive(mask)
    gm, inputs = capture(Decoder(form), tokens(2)[:, :5], None, cache, given)
    expected = values(gm, inputs)["output"]
    compressed = pasts(gm)
    result = rewritten(gm, inputs, compressed=compressed)
    assert result.plan.kind == "continuation"
    placeholders = gm.graph.find_nodes(op="placeholder")
    rest = [value for node, value in zip(placeholders, inputs, strict=True) if node.name not in compressed]
    state = full_state(cache, slots=60)
    outputs = values(result.gm, [*rest, *state])["output"]
    index = next(i for i, node in enumerate(output_nodes(gm)) if "linear" in node.name)
    torch.testing.assert_close(outputs[index][:, left:], expected[index][:, left:])
    assert outputs[-1].tolist() == [12 - left, 12]
    for layer in range(2):
        assert kept_positions(state, layer, 0).tolist() == list(range(12 - left))
        assert kept_positions(state, layer, 1).tolist() == list(range(12))
        assert state.protect_from[:, layer].tolist() == [7, 7]


def test_operations() -> None:
    gm, inputs = capture(Decoder(masked), tokens()[:, :5], None, full_cache(7), causal(1, 5, past=7))
    result = rewritten(gm, inputs, compressed=pasts(gm)).gm
    called = calls(result)
    assert called.count("continue_step") == 2 and called.count("advance_lengths") == 1
    assert "scaled_dot_product_attention" not in called and "cat" not in called
    assert not pasts(result)
    assert "continue_step" not in calls(rewritten(gm, inputs).gm)


def test_golden() -> None:
    gm, inputs = capture(Decoder(masked, layers=1), tokens()[:, :5], None, full_cache(7, layers=1), causal(1, 5, past=7))
    result = rewritten(gm, inputs, compressed=pasts(gm))
    inserted = [line for line in render(result.gm).splitlines() if "= placeholder" not in line]
    assert_expected_inline(
        "\n".join(inserted),
        """\
%tgvkv_out_0 : f32[1, 4, 5, 4] = continue_step(%q, %k, %v, %l_mask_, (%tgvkv_key_arena, %tgvkv_value_arena, %tgvkv_slot_position, %tgvkv_segment_start, %tgvkv_segment_len, %tgvkv_next_slot, %tgvkv_protect_from, %tgvkv_keep_rate, %tgvkv_lengths), layer=0, scale=0.5)
%tgvkv_lengths_next : i64[1] = advance_lengths(%tgvkv_lengths, %l_mask_, %k)""",
    )
