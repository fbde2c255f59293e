from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import configs, indices, keep_per_layer, random_attention, vision_at, vision_masks
from tests.support.oracle import Oracle
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import classify_tokens


def _keep(score: list[float], vision: Tensor, kept: int, sinks: int = 1) -> list[int]:
    token_types = classify_tokens(vision[None], None)
    return indices(
        select_tokens(torch.tensor([score]), text_first(token_types), token_types, torch.tensor([kept]), sink_tokens=sinks)[0]
    )


def _keep_by_lists(score: list[float], vision: list[bool], kept: int, sinks: int) -> list[int]:
    """The rule in words, with Python's sort."""
    length = len(score)
    forced = [p for p in range(length) if p < sinks or p == length - 1]
    rest = [p for p in range(length) if p not in forced]
    best = sorted(rest, key=lambda p: (not vision[p], score[p], p), reverse=True)
    return sorted(forced + best[: kept - len(forced)])


def test_text_outranks_vision_however_it_scores() -> None:
    assert _keep([0.0, 1e-9, 500.0, 400.0, 1e-8, 0.0], vision_at(6, (2, 2)), 4) == [0, 1, 4, 5]
    assert _keep([0.0, 1e-9, 500.0, 400.0, 1e-8, 0.0], vision_at(6, (2, 2)), 5) == [0, 1, 2, 4, 5]


def test_text_scores_closer_than_a_constant_added_could_tell() -> None:
    """100 + s in bfloat16 would make these equal, and the later one would win."""
    score = [0.0, 0.3, 0.2, 0.1, 0.0, 0.0]
    assert _keep(score, vision_at(6, (4, 1)), 3) == [0, 1, 5]


def test_of_equals_the_earlier_goes_first() -> None:
    assert _keep([1.0] * 8, torch.zeros(8, dtype=torch.bool), 5) == [0, 4, 5, 6, 7]
    assert _keep([1.0] * 8, vision_at(8, (1, 6)), 5) == [0, 4, 5, 6, 7]


def test_a_nan_score_counts_as_nothing() -> None:
    assert _keep([0.0, float("nan"), 0.1, 0.2, 0.0], torch.zeros(5, dtype=torch.bool), 4) == [0, 2, 3, 4]


@given(vision_masks(), st.data())
@settings(max_examples=200)
def test_selection_is_the_rule_in_words(vision: Tensor, data: st.DataObject) -> None:
    length = len(vision)
    sinks = data.draw(st.sampled_from([0, 1, 4]))
    # Few distinct scores, so that there are ties.
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 200.0])
    score = data.draw(st.lists(values, min_size=length, max_size=length))
    kept = data.draw(st.integers(min(length, sinks + 1), length))
    left = data.draw(st.integers(0, 4))
    token_types = classify_tokens(
        torch.cat([torch.zeros(left, dtype=torch.bool), vision])[None], vision_at(left + length, (left, length))[None]
    )
    # Padding scores highest, to tempt.
    padded = torch.tensor([[1e9] * left + score])
    keep = select_tokens(padded, text_first(token_types), token_types, torch.tensor([kept]), sink_tokens=sinks)[0]
    assert indices(keep[left:]) == _keep_by_lists(score, vision.tolist(), kept, sinks)
    assert int(keep.sum()) == kept
    assert not keep[:left].any()


@given(st.lists(vision_masks(min_length=2, max_length=24), min_size=2, max_size=3), configs(), st.randoms())
@settings(max_examples=25)
def test_neither_padding_nor_batch_order_matters(prompts: list[Tensor], config: EvictionConfig, random: Random) -> None:
    layers, longest = 3, max(len(vision) for vision in prompts) + 2
    alone = []
    for index, vision in enumerate(prompts):
        oracle = Oracle(config)
        oracle.prefill(random_attention(layers, len(vision), seed=index), vision)
        alone.append(oracle.kept)
    order = list(range(len(prompts)))
    random.shuffle(order)
    attention = torch.zeros(layers, len(prompts), longest, longest)
    vision = torch.zeros(len(prompts), longest, dtype=torch.bool)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    starts = [random.choice([0, longest - len(prompts[index])]) for index in order]
    for row, (index, start) in enumerate(zip(order, starts, strict=True)):
        inner = slice(start, start + len(prompts[index]))
        attention[:, row] = 3 * torch.rand(layers, longest, longest)  # rows and columns of padding hold garbage
        attention[:, row, inner] = 0.0
        attention[:, row, inner, inner] = random_attention(layers, len(prompts[index]), seed=index)
        vision[row, inner], valid[row, inner] = prompts[index], True
    together = keep_per_layer(attention, classify_tokens(vision, valid), config)
    for row, (index, start) in enumerate(zip(order, starts, strict=True)):
        assert [[p - start for p in kept] for kept in together[row]] == alone[index]


@pytest.mark.parametrize("budget_of", ["all", "vision"])
def test_a_vision_budget_loses_no_text_even_behind_an_opening_image(budget_of: str) -> None:
    config = EvictionConfig(budget=0.05, budget_of=budget_of)  # type: ignore[arg-type]
    vision = vision_at(40, (0, 30))
    oracle = Oracle(config)
    oracle.prefill(random_attention(4, 40, seed=1), vision)
    for kept in oracle.kept:
        assert set(range(4)) <= set(kept)
        assert (set(range(30, 40)) <= set(kept)) == (budget_of == "vision")
