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
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.ops.state import CompactState, Prefilled, split_off
from tgvkv_compile.runtime.compact import kept_positions

FORMS: list[Any] = [
    pytest.param(flag, None, id="flag"),
    pytest.param(masked, causal(2, 19, left=3), id="padded"),
    pytest.param(written_out, additive(causal(2, 19, left=3)), id="written-out"),
]


@pytest.mark.parametrize(("form", "mask"), FORMS)
@pytest.mark.parametrize("budget", [0.4, 8, 1.0])
def test_the_arena_holds_the_kept_keys_and_values(form: Any, mask: Tensor | None, budget: float | int) -> None:
    gm, inputs = capture(Decoder(form), tokens(2), features(2), None, mask)
    before = values(gm, inputs)
    result = rewritten(gm, inputs, config=EvictionConfig(budget))
    got = values(result.gm, [*inputs, SLOTS])
    outputs, told = split_off(got["output"], Prefilled)
    outputs, state = split_off(outputs, CompactState)
    assert (told.valid is None) == (mask is None)
    assert state.key_arena.shape == (2, 2, SLOTS, 4)
    padding = torch.tensor([3 if mask is not None else 0, 0])
    for layer, site in enumerate(result.plan.sites):
        assert outputs[site.key.output] is None and outputs[site.value.output] is None
        keep = got[f"tgvkv_keep_{layer}"]
        assert torch.equal(keep.sum(1), got["tgvkv_budgets"].kept[:, layer])
        assert torch.equal(state.segment_len[:, layer], keep.sum(1))
        for sample in range(2):
            columns = keep[sample].nonzero()[:, 0]
            start = int(state.segment_start[sample, layer])
            slots = slice(start, start + len(columns))
            for arena, cat in ((state.key_arena, site.key), (state.value_arena, site.value)):
                expected = got[cat.node.name][sample][:, columns]
                torch.testing.assert_close(arena[sample][:, slots], expected, rtol=0, atol=0)
            assert torch.equal(kept_positions(state, layer, sample), columns - padding[sample])
    logits = [index for index, node in enumerate(output_nodes(gm)) if "linear" in node.name]
    (index,) = logits
    torch.testing.assert_close(outputs[index][:, 3:], before["output"][index][:, 3:])


def test_operations() -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(), features())
    assert not {"select_tokens", "evict_into", "new_arena"} & set(calls(rewritten(gm, inputs, "insert_budgeting").gm))
    called = calls(rewritten(gm, inputs, "insert_eviction").gm)
    assert called.count("select_tokens") == called.count("evict_into") == 3
    assert called.count("new_arena") == called.count("open_segments") == called.count("segment_starts") == 1


def test_no_output_is_as_long_as_the_prompt() -> None:
    gm, inputs = capture(Decoder(masked), tokens(), features(), None, causal(1, 19))
    long = [node for node in output_nodes(gm) if 19 in node.meta["example_value"].shape[2:]]
    assert len(long) == 4
    result = rewritten(gm, inputs)
    kept = [node for node in output_nodes(result.gm) if node is not None and node.meta["example_value"].ndim == 4]
    assert len(kept) == 2 and all(19 not in node.meta["example_value"].shape for node in kept)


def test_golden() -> None:
    gm, inputs = capture(Decoder(layers=1), tokens(), features())
    result = rewritten(gm, inputs).gm
    scoring = set(render(rewritten(gm, inputs, "insert_budgeting").gm).splitlines())
    inserted = "\n".join(line for line in render(result).splitlines() if line not in scoring)
    assert_expected_inline(
        inserted,
        """\
%tgvkv_slots : SymInt = placeholder
%tgvkv_kept : i64[1, 1] = getitem(%tgvkv_budgets, 0)
%tgvkv_rate : f32[1, 1] = getitem(%tgvkv_budgets, 1)
%tgvkv_positions : i64[1, 19] = getitem(%tgvkv_types, 3)
%tgvkv_lengths : i64[1] = getitem(%tgvkv_types, 4)
%tgvkv_arena : Arena = new_arena(%keys, %values, %tgvkv_slots)
%tgvkv_room : i64[] = fitting_reserve(%tgvkv_budgets, %tgvkv_lengths, %tgvkv_arena, 4, budget=0.4, budget_of='all', budgeting='tvb', decode='ratio', sink_tokens=4)
%tgvkv_starts : i64[1, 1] = segment_starts(%tgvkv_budgets, %tgvkv_lengths, %tgvkv_room, budget=0.4, budget_of='all', budgeting='tvb', decode='ratio', sink_tokens=4)
%tgvkv_counts : tuple = by_layer(%tgvkv_kept)
%tgvkv_kept_0 : i64[1] = getitem(%tgvkv_counts, 0)
%tgvkv_firsts : tuple = by_layer(%tgvkv_starts)
%tgvkv_start_0 : i64[1] = getitem(%tgvkv_firsts, 0)
%tgvkv_keep_0 : bool[1, 19] = select_tokens(%tgvkv_score_0, %tgvkv_tier_0, %tgvkv_types, %tgvkv_kept_0, sink_tokens=4)
%tgvkv_evict_0 : NoneType = evict_into(%tgvkv_arena, %keys, %values, %tgvkv_keep_0, %tgvkv_positions, %tgvkv_start_0)
%tgvkv_state : Bookkeeping = open_segments((%tgvkv_keep_0), (%tgvkv_types), %tgvkv_starts)
%tgvkv_key_arena : f32[1, 2, sym, 4] = getitem(%tgvkv_arena, 0)
%tgvkv_value_arena : f32[1, 2, sym, 4] = getitem(%tgvkv_arena, 1)
%tgvkv_slot_position : i32[1, sym] = getitem(%tgvkv_arena, 2)
%tgvkv_segment_len : i64[1, 1] = getitem(%tgvkv_state, 0)
%tgvkv_next_slot : i64[1, 1] = getitem(%tgvkv_state, 1)
%tgvkv_protect_from : i64[1, 1] = getitem(%tgvkv_state, 2)
%tgvkv_history : bool[1, 19] = vision_history(%tgvkv_types)""",
    )
