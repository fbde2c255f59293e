from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cases import StepCase, quantised, random_step
from tests.kernels.comparing import check_step, plain, same_books
from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache import decode_step as op
from tgvkv_compile.ops.cache.rows import RowForm, from_rows
from tgvkv_compile.ops.cache.window import has_window
from tgvkv_compile.ops.kernels.triton import decode as kernels
from tgvkv_compile.ops.kernels.triton.decode import fused_applies, fused_decode_step
from tgvkv_compile.ops.state import CompactState

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["ratio", "fixed", "keep"]
KINDS = get_args(KVDtype)
HEADS = [(32, 1), (64, 4), (80, 1), (80, 7), (96, 2), (128, 1), (128, 8), (256, 3)]


def fused(case: StepCase, decode: str = "ratio") -> tuple[Tensor, CompactState]:
    state = case.fresh()
    options = (case.layer, case.scale, decode, 4, case.kv_dtype)
    return fused_decode_step(case.query, case.key, case.value, state, *options), state


def in_window(case: StepCase) -> int:
    """How many of the layer's entries are read from its window."""
    state, layer = case.state, case.layer
    before = int(state.segment_start[0, 0])
    per_layer = before // state.segment_start.shape[1]
    found = 0
    for sample, held in enumerate(state.slot_position):
        newest = held[layer * per_layer : (layer + 1) * per_layer]
        start, count = int(state.segment_start[sample, layer]), int(state.segment_len[sample, layer]) + 1
        entries = held[start : start + count]
        found += int(torch.isin(entries[entries >= 0], newest[newest >= 0]).sum())
    return found


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), HEADS)
def test_every_head_dim_and_kind_of_group(kv_dtype: KVDtype, dtype: torch.dtype, dim: int, group: int) -> None:
    whole = random_step(batch=2, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=70, seed=dim + group)
    case = quantised(whole, kv_dtype)
    assert fused_applies(case.query, case.state, kv_dtype)
    assert (in_window(case) > 3) == has_window(kv_dtype)
    check_step(fused_decode_step, case, "ratio")


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepCase, str, int, int]:
    whole = random_step(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.integers(1, 8)),
        dim=draw(st.sampled_from([32, 64, 80, 96])),
        layers=draw(st.integers(1, 3)),
        longest=draw(st.sampled_from([6, 17, 64, 200])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9999)),
    )
    case = quantised(whole, draw(st.sampled_from(KINDS)), entries=draw(st.sampled_from([1, 3, 16])))
    return case, draw(st.sampled_from(MODES)), draw(st.sampled_from([0, 4])), draw(st.sampled_from([1, 8, 132]))


@given(steps())
@settings(max_examples=30)
def test_random_ragged_segments(drawn: tuple[StepCase, str, int, int]) -> None:
    case, decode, sink, processors = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "processors", lambda device: processors)  # few: one part; many: more parts than blocks
        check_step(fused_decode_step, case, decode, sink)


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("decode", MODES)
def test_many_steps_keep_the_same_books(decode: str, kv_dtype: KVDtype) -> None:
    """Of two layers and samples of different lengths; a window of three entries is written again and again."""
    group = 2 if decode == "ratio" else 1
    case = quantised(random_step(batch=2, kv_heads=1, group=group, dim=32, layers=2, longest=30, seed=3), kv_dtype, entries=3)
    ours, theirs = case.fresh(), case.fresh()
    random = torch.Generator().manual_seed(0)
    for _ in range(12):
        new = [torch.randn(2, heads, 1, 32, generator=random) for heads in (group, 1, 1)]
        for layer in range(2):
            got = fused_decode_step(*new, ours, layer, 0.125, decode, 4, kv_dtype)
            expected = op._decode_step(*new, *theirs, layer, 0.125, decode, 4, kv_dtype)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        same_books(ours, theirs, kv_dtype)
        ours, theirs = (state._replace(lengths=state.lengths + 1) for state in (ours, theirs))
    moved = ours.segment_len - case.state.segment_len
    assert bool((moved == 12).all()) if decode == "keep" else bool((moved < 12).any())


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("group", [1, 2])
def test_what_is_written_meanwhile_is_not_read(kv_dtype: KVDtype, group: int) -> None:
    """The new token's slot and its entry of the window, whatever bytes and position another program finds there."""
    case = quantised(random_step(batch=2, kv_heads=2, group=group, dim=64, seed=6), kv_dtype)
    expected, _ = fused(case)
    state, layer = case.state, case.layer
    for sample in range(2):
        written = [state.next_slot[sample, layer]]
        if has_window(kv_dtype):
            entry = 32 * layer + 2 * (int(state.lengths[sample]) % 16)
            written += [entry, entry + 1]
            state.slot_position[sample, entry] = state.lengths[sample] - 16  # as before the step
        for arena in state[:2]:
            arena[sample, :, written] = 255
    assert torch.equal(fused(case)[0], expected)


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("arena", ["key_arena", "value_arena"])
def test_a_row_whose_scale_is_no_number_is_read_as_none(arena: str, group: int, kv_dtype: KVDtype) -> None:
    case = quantised(random_step(batch=2, kv_heads=2, group=group, dim=64, seed=2), kv_dtype, entries=1)
    start = int(case.state.segment_start[0, case.layer])
    slot = start + int((case.state.slot_position[0, start:] >= 0).nonzero()[3])
    getattr(case.state, arena)[0, 0, slot, -4:] = torch.tensor([0, 0, 0x7E, 0x7E], dtype=torch.uint8)
    for output, _ in (plain(case, "fixed"), fused(case, "fixed")):
        assert bool(output[0, :group].isnan().all())
        assert not bool(output[0, group:].isnan().any() or output[1].isnan().any())


CHANNEL = torch.arange(64)
SPECIAL: list[Any] = [
    *(0.0, 1.0, -3.25, 1e-7, 65504.0, 1e6),  # in all channels
    torch.linspace(-1e6, 1e6, 64),  # a scale that float16 does not have
    torch.linspace(-1e-6, 1e-6, 64),  # one that it has but few bits of
    CHANNEL * 1e-9,  # one that is 0
    *(torch.where(CHANNEL == 5, odd, 1.0) for odd in (float("nan"), float("inf"), float("-inf"), -7.0)),
    CHANNEL - 448.0,
    2.0 ** (CHANNEL / 4 - 12),  # float8 down to its least steps
    (CHANNEL % 32) / 2 + 0.25,  # ties
]


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("channels", SPECIAL, ids=range(len(SPECIAL)))
def test_rows_of_special_vectors(channels: float | Tensor, kv_dtype: KVDtype) -> None:
    whole = random_step(batch=1, kv_heads=1, group=1, dim=64, longest=20)
    for tensor in (whole.key, whole.value):
        tensor.copy_(torch.as_tensor(channels).float())
    case = quantised(whole, kv_dtype)
    after = [fused(case)[1], plain(case, "ratio")[1]]
    slot = int(case.state.next_slot[0, case.layer])
    form = RowForm(kv_dtype, 64, torch.float32)
    ours, theirs = (from_rows(state.value_arena[0, 0, slot], form, keys=False) for state in after)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    ours, theirs = (from_rows(state.key_arena[0, 0, slot], form, keys=True) for state in after)
    largest = float(whole.key[whole.key.isfinite()].abs().max())  # keys' sums are in another order
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest, equal_nan=True)


@pytest.mark.parametrize("group", [1, 4])
def test_a_query_of_another_dtype_under_autocast(group: int) -> None:
    whole = random_step(batch=2, kv_heads=2, group=group, dim=64, query_dtype=torch.bfloat16, seed=group)
    check_step(fused_decode_step, quantised(whole, "int8"), "ratio")


@pytest.mark.parametrize("dim", [62, 260])
def test_rows_that_are_no_whole_words_and_huge_heads_go_the_plain_way(dim: int) -> None:
    whole = random_step(batch=1, kv_heads=1, group=1, dim=dim, longest=20)
    assert not fused_applies(whole.query, quantised(whole, "int8").state, "int8")
