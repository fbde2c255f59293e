import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.prompts import indices, vision_at, vision_masks
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.token_types import classify_tokens, forced_tokens, vision_count


def test_question_is_the_text_after_the_last_image() -> None:
    token_types = classify_tokens(vision_at(12, (1, 3), (6, 2))[None], None)
    assert indices(token_types.question[0]) == [8, 9, 10, 11]
    assert token_types.positions.tolist() == [list(range(12))]
    assert token_types.lengths.tolist() == [12]


def test_a_prompt_that_ends_in_vision_asks_with_its_last_token() -> None:
    token_types = classify_tokens(vision_at(6, (2, 4))[None], None)
    assert indices(token_types.question[0]) == [5]


def test_a_prompt_without_vision_is_all_question() -> None:
    valid = torch.tensor([[False, True, True, True]])
    token_types = classify_tokens(torch.zeros(1, 4, dtype=torch.bool), valid)
    assert torch.equal(token_types.question, valid)


@given(vision_masks(), st.integers(0, 5), st.integers(0, 5))
def test_padding_on_either_side_changes_no_token_type(vision: torch.Tensor, left: int, right: int) -> None:
    bare = classify_tokens(vision[None], None)
    # Padding marked as vision must not count as vision.
    marked = torch.cat([torch.ones(left, dtype=torch.bool), vision, torch.ones(right, dtype=torch.bool)])
    valid = vision_at(len(marked), (left, len(vision)))
    padded = classify_tokens(marked[None], valid[None])
    inner = slice(left, left + len(vision))
    for name in ("valid", "vision", "question"):
        assert torch.equal(getattr(padded, name)[:, inner], getattr(bare, name))
        assert int(getattr(padded, name).sum()) == int(getattr(bare, name).sum())
    assert torch.equal(padded.positions[:, inner], bare.positions)
    assert bool((padded.positions[~padded.valid] == -1).all())
    assert torch.equal(padded.lengths, bare.lengths)


@given(vision_masks())
def test_last_token_is_always_question_and_forced(vision: torch.Tensor) -> None:
    token_types = classify_tokens(vision[None], None)
    assert bool(token_types.question[0, -1])
    assert bool(forced_tokens(token_types, sink_tokens=0)[0, -1])


def test_sinks_in_an_image_are_not_vision_to_a_vision_budget() -> None:
    token_types = classify_tokens(vision_at(10, (0, 6))[None], None)
    assert indices(forced_tokens(token_types, sink_tokens=4)[0]) == [0, 1, 2, 3, 9]
    assert vision_count(token_types, config=EvictionConfig(budget_of="vision")).tolist() == [2]
    assert vision_count(token_types, config=EvictionConfig(budget_of="all")).tolist() == [6]
