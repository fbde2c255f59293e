"""A first picture on a cache of text: the graph finds out by itself what `insert_survivors` is told."""

from typing import Any

import pytest
import torch

from tests.passes.decoder import (
    Decoder,
    additive,
    calls,
    capture,
    causal,
    features,
    full_cache,
    masked,
    pasts,
    rewritten,
    tokens,
    values,
    written_out,
)
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.cache.later_turns import whole_past
from tgvkv_compile.ops.state import Reselected, split_off
from tgvkv_compile.pipeline import plan_of

PAST, NEW = 9, 19


def captured(form: Any, left: int) -> tuple[Any, list[Any], Any]:
    """A turn of two samples; the first `left` tokens of the past of sample 0 are padding."""
    mask, cache = causal(2, NEW, past=PAST, left=left), full_cache(PAST, batch=2)
    gm, inputs = capture(Decoder(form), tokens(2), features(2), cache, mask if form is masked else additive(mask))
    return gm, inputs, cache


@pytest.mark.parametrize(("form", "left"), [(masked, 0), (masked, 3), (written_out, 2)])
@pytest.mark.parametrize("options", [{"budget": 0.4}, {"budget": 0.5, "budget_of": "vision"}, {"budget": 1.0}])
def test_it_is_a_turn_on_survivors_that_are_everything(form: Any, left: int, options: dict[str, Any]) -> None:
    config = EvictionConfig(**options)
    gm, inputs, cache = captured(form, left)
    late = rewritten(gm, inputs, compressed=frozenset(), config=config)
    assert late.plan.kind == "late_prefill" and "whole_past" in " ".join(calls(late.gm))
    found = values(late.gm, inputs)["output"]

    turn = rewritten(gm, inputs, compressed=pasts(gm), config=config)
    lengths = torch.tensor([PAST - left, PAST])
    positions = torch.stack([torch.arange(PAST) - left, torch.arange(PAST)]).clamp(min=-1)
    given: list[Any] = [torch.zeros(2, PAST, dtype=torch.bool), lengths, torch.ones(2, 2)]
    for keys, values_ in cache:
        given += [keys, values_, positions]
    held = pasts(gm)
    rest = [x for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True) if node.name not in held]
    expected = values(turn.gm, [*rest, *given])["output"]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    _, decided = split_off(found, Reselected)
    assert decided.lengths.tolist() == [PAST + NEW - left, PAST + NEW]
    if options["budget"] == 1.0:
        assert decided.kept.tolist() == [[PAST + NEW - left] * 2, [PAST + NEW] * 2]
    else:
        assert int(decided.kept.sum()) < 4 * (PAST + NEW) - 2 * left


def test_a_past_without_a_mask_has_no_padding() -> None:
    history, lengths, positions = whole_past(None, torch.zeros(2, 1, 3, 4))
    assert not history.any() and lengths.tolist() == [3, 3] and positions.tolist() == [[0, 1, 2]] * 2


def test_a_cache_that_is_half_in_use_is_a_miss() -> None:
    cache = full_cache(PAST)
    cache[1] = (torch.tensor([]), torch.tensor([]))
    gm, _ = capture(Decoder(), tokens(), features(), cache)
    plan = plan_of(gm, frozenset())
    assert plan.kind == "dense" and plan.misses
