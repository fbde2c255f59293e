import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.prompts import indices, vision_at, vision_masks
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.static.selection import pack_columns, pack_layer, select_by_threshold
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens

LARGEST = torch.finfo(torch.float32).max
# Ties, neighbours in the last bit, both ends of the normal and of the subnormal numbers.
SCORES = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0 + 2.0**-23, 2.0**-126, 2.0**-126 - 2.0**-149, 2.0**-149, 2.0**127, LARGEST]),
    st.floats(0.0, LARGEST, width=32),
)


@given(vision_masks(), st.integers(0, 4), st.sampled_from([0, 1, 4]), st.data())
@settings(max_examples=300, deadline=None)
def test_the_threshold_keeps_what_sorting_keeps(vision: Tensor, left: int, sinks: int, data: st.DataObject) -> None:
    length = len(vision)
    score = data.draw(st.lists(SCORES, min_size=length, max_size=length))
    kept = torch.tensor([data.draw(st.integers(min(length, sinks + 1), length))])
    token_types = classify_tokens(
        torch.cat([torch.zeros(left, dtype=torch.bool), vision])[None], vision_at(left + length, (left, length))[None]
    )
    padded = torch.tensor([[LARGEST] * left + score])  # padding scores highest, to tempt
    expected = select_tokens(padded, text_first(token_types), token_types, kept, sink_tokens=sinks)
    assert indices(select_by_threshold(padded, text_first(token_types), token_types, kept, sink_tokens=sinks)[0]) == indices(
        expected[0]
    )


@given(st.integers(1, 6), st.integers(6, 400), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rows_of_a_batch_are_searched_each_for_itself(batch: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(batch, length, generator=generator) ** torch.randint(1, 40, (batch, 1), generator=generator)
    score = score.round(decimals=2) if seed % 2 else score
    token_types = classify_tokens(torch.rand(batch, length, generator=generator) < 0.6, None)
    kept = torch.randint(5, length + 1, (batch,), generator=generator)
    expected = select_tokens(score, text_first(token_types), token_types, kept, sink_tokens=4)
    assert torch.equal(select_by_threshold(score, text_first(token_types), token_types, kept, sink_tokens=4), expected)


@pytest.mark.parametrize(("odd", "counts_as"), [(float("nan"), 0.0), (-1.0, 0.0), (float("inf"), LARGEST)])
def test_scores_that_are_no_sums_of_probabilities(odd: float, counts_as: float) -> None:
    token_types = classify_tokens(torch.zeros(1, 6, dtype=torch.bool), None)
    for kept in range(1, 7):
        found, expected = (
            select_by_threshold(
                torch.tensor([[0.0, 0.1, value, 0.2, 0.0, 0.0]]),
                text_first(token_types),
                token_types,
                torch.tensor([kept]),
                sink_tokens=0,
            )
            for value in (odd, counts_as)
        )
        assert torch.equal(found, expected) and int(found.sum()) == kept


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 50))
@settings(deadline=None)
def test_packing_is_indexing(keep: list[bool], more: int) -> None:
    wanted = [position for position, kept in enumerate(keep) if kept]
    columns, filled = pack_columns(torch.tensor([keep]), len(wanted) + more)
    assert columns[filled].tolist() == wanted
    assert columns.shape == filled.shape == (1, len(wanted) + more)
    assert not columns[~filled].any()


def test_packing_a_layer_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 3, 9, 4, generator=generator)
    keep = torch.rand(2, 9, generator=generator) < 0.5
    positions = torch.stack([torch.arange(9), torch.arange(9) - 1])
    packed_key, packed_value, slots = pack_layer(key, value[..., :2], positions, keep, 9)
    assert (packed_key.shape, packed_value.shape, slots.shape) == ((2, 3, 9, 4), (2, 3, 9, 2), (2, 9))
    for sample in range(2):
        count = int(keep[sample].sum())
        assert torch.equal(packed_key[sample, :, :count], key[sample][:, keep[sample]])
        assert torch.equal(packed_value[sample, :, :count], value[sample][:, keep[sample]][..., :2])
        assert slots[sample].tolist() == positions[sample][keep[sample]].tolist() + [-1] * (9 - count)


def test_more_kept_than_slots_takes_the_first() -> None:
    columns, filled = pack_columns(torch.tensor([[True, False, True, True]]), 2)
    assert columns.tolist() == [[0, 2]] and filled.all()


class _Selection(torch.nn.Module):
    def forward(self, score: Tensor, vision: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.ones_like(vision)
        positions = torch.arange(score.shape[1]).expand(score.shape)
        lengths = torch.full_like(kept, score.shape[1])
        token_types = TokenTypes(everything, vision, ~vision, positions, lengths)
        return pack_columns(select_by_threshold(score, text_first(token_types), token_types, kept, sink_tokens=4), 32)


def test_no_operator_that_engines_lack() -> None:
    call = (torch.rand(1, 40), torch.rand(1, 40) < 0.5, torch.tensor([12]))
    dynamic = {1: torch.export.Dim("length", min=16, max=16384)}
    program = torch.export.export(_Selection(), call, dynamic_shapes=(dynamic, dynamic, None)).run_decompositions()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = {str(node.target).split(".")[1] for node in calls if str(node.target).startswith("aten.")}
    assert names & {"cumsum", "scatter"} == {"cumsum", "scatter"}
    forbidden = {"topk", "sort", "argsort", "searchsorted", "kthvalue", "scatter_add", "index_put", "nonzero", "view_as"}
    assert not names & forbidden
    for node in calls:
        if str(node.target).startswith("aten.cumsum"):
            assert node.args[0].meta["val"].dtype == torch.float32
    longer = (torch.rand(1, 5000), torch.rand(1, 5000) < 0.5, torch.tensor([30]))
    for found, expected in zip(program.module()(*longer), _Selection()(*longer), strict=True):
        assert torch.equal(found, expected)
