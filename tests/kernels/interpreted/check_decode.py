import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cases import StepCase, random_step
from tests.kernels.comparing import check_many_steps, check_step, decided, plain, same_books
from tgvkv_compile.errors import InternalError
from tgvkv_compile.ops.kernels.triton import decode as kernels
from tgvkv_compile.ops.kernels.triton.decode import fused_decode_step
from tgvkv_compile.ops.state import CompactState

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["ratio", "fixed", "keep"]


def fused(case: StepCase, decode: str, sink: int = 4) -> tuple[Tensor, CompactState]:
    state = case.fresh()
    return fused_decode_step(case.query, case.key, case.value, state, case.layer, case.scale, decode, sink), state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (64, 4), (80, 7), (96, 2), (128, 1), (128, 8), (256, 3), (256, 1)])
def test_every_dtype_head_dim_and_kind_of_group(dtype: torch.dtype, dim: int, group: int) -> None:
    case = random_step(batch=2, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=90, seed=dim + group)
    assert decided(case)
    check_step(fused_decode_step, case, "ratio")


@st.composite
def steps(draw: st.DrawFn) -> tuple[StepCase, str, int, int]:
    case = random_step(
        batch=draw(st.integers(1, 4)),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.integers(1, 8)),
        dim=draw(st.sampled_from([64, 80, 128])),
        layers=draw(st.integers(1, 4)),
        longest=draw(st.sampled_from([6, 17, 64, 300])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9999)),
    )
    return case, draw(st.sampled_from(MODES)), draw(st.sampled_from([0, 4])), draw(st.sampled_from([1, 8, 132]))


@given(steps())
@settings(max_examples=40)
def test_random_ragged_segments(drawn: tuple[StepCase, str, int, int]) -> None:
    case, decode, sink, processors = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "processors", lambda device: processors)  # few: one part; many: more parts than blocks
        check_step(fused_decode_step, case, decode, sink)


@pytest.mark.parametrize("decode", MODES)
def test_many_steps_keep_the_same_books(decode: str) -> None:
    check_many_steps(fused_decode_step, decode)


@pytest.mark.parametrize("group", [1, 2])
def test_of_equals_the_earlier_position_goes_wherever_its_slot_is(group: int) -> None:
    case = random_step(batch=3, kv_heads=2, group=group, dim=64, longest=200, seed=5)
    case.query.zero_()  # all logits alike, to the last bit
    _, state = fused(case, "fixed")
    _, books = plain(case, "fixed")
    same_books(state, books)
    _, _, positions, _ = case.exact()
    protected = case.state.protect_from[:, case.layer]
    for sample in range(3):
        here = positions[sample]
        earliest = here[(here >= 4) & (here <= protected[sample])].min()
        at = int(state.next_slot[sample, case.layer] - state.segment_start[sample, case.layer])
        assert here[at] == earliest


@pytest.mark.parametrize("edge", ["moves", "stays"])
def test_the_protected_suffix_moves_before_the_choice(edge: str) -> None:
    """The entry at the old `protect_from` may go if a later one is there, and may not if none is."""
    case = random_step(batch=2, kv_heads=1, group=1, dim=64, layers=1, longest=80, seed=0)
    assert bool((case.state.segment_len > 10).all())
    for sample in range(2):
        start, count = int(case.state.segment_start[sample, 0]), int(case.state.segment_len[sample, 0])
        case.state.slot_position[sample] = -1
        case.state.slot_position[sample, start : start + count] = torch.arange(count)
        case.state.next_slot[sample, 0] = start + count
        case.state.lengths[sample] = count
        case.state.protect_from[sample, 0] = 7 if edge == "moves" else count
    case.query.fill_(1.0)
    case.state.key_arena.fill_(1.0)
    for sample in range(2):
        case.state.key_arena[sample, :, case.state.segment_start[sample, 0] + 7] = -1.0  # the least attention
    _, state = fused(case, "fixed")
    same_books(state, plain(case, "fixed")[1])
    assert state.protect_from[0, 0] == (8 if edge == "moves" else case.state.protect_from[0, 0])
    if edge == "moves":
        assert int(state.next_slot[0, 0] - state.segment_start[0, 0]) == 7


def test_nothing_evictable_nothing_evicted() -> None:
    case = random_step(batch=2, kv_heads=1, group=1, dim=64, longest=20, seed=2)
    _, state = fused(case, "fixed", sink=10_000)
    same_books(state, plain(case, "fixed", sink=10_000)[1])
    assert torch.equal(state.segment_len[:, case.layer], case.state.segment_len[:, case.layer] + 1)


def test_samples_that_never_lose_anything() -> None:
    case = random_step(batch=2, kv_heads=1, group=1, dim=64, longest=20, seed=2)
    case.state.keep_rate[0] = 1.0
    _, state = fused(case, "fixed")
    same_books(state, plain(case, "fixed")[1])
    assert (state.segment_len - case.state.segment_len)[:, case.layer].tolist() == [1, 0]


def test_the_ratio_rounds_as_the_plain_op_does() -> None:
    """`length - total * rate` in two roundings; the products are chosen so that some are a last bit short of a whole number."""
    differs = 0
    for seed in range(12):
        case = random_step(batch=4, kv_heads=1, group=1, dim=64, layers=1, longest=12, seed=seed)
        length = (case.state.segment_len[:, 0] + 1).float()
        total = (case.state.lengths + 1).float()
        case.state.keep_rate[:, 0] = (length - 1) / total
        _, state = fused(case, "ratio")
        same_books(state, plain(case, "ratio")[1])
        differs += int((state.segment_len != case.state.segment_len).sum())
    assert 0 < differs < 48


def test_only_the_layer_is_touched() -> None:
    case = random_step(batch=2, kv_heads=2, group=2, dim=64, seed=8)
    _, state = fused(case, "fixed")
    others = torch.arange(3) != case.layer
    for name in ("segment_len", "next_slot", "protect_from"):
        assert torch.equal(getattr(state, name)[:, others], getattr(case.state, name)[:, others])
    for name in ("segment_start", "keep_rate", "lengths"):
        assert torch.equal(getattr(state, name), getattr(case.state, name))
    changed = (state.key_arena != case.state.key_arena).any(3).any(1)
    assert changed.sum(1).tolist() == [1, 1]
    assert bool((changed.nonzero()[:, 1] == case.state.next_slot[:, case.layer]).all())


def test_a_cache_of_another_dtype_under_autocast() -> None:
    for group in (1, 4):
        case = random_step(
            batch=2, kv_heads=2, group=group, dim=64, dtype=torch.float32, query_dtype=torch.bfloat16, seed=group
        )
        check_step(fused_decode_step, case, "ratio")


def test_nan_is_not_a_way_out_of_the_arena() -> None:
    case = random_step(batch=2, kv_heads=1, group=2, dim=64, seed=4)
    case.query.fill_(float("nan"))
    output, state = fused(case, "fixed")
    assert bool(output.isnan().all())
    assert torch.equal(state.segment_len[:, case.layer], case.state.segment_len[:, case.layer])
    inside = state.next_slot[:, case.layer] - state.segment_start[:, case.layer]
    assert bool((inside >= 0).all()) and bool((inside <= case.state.segment_len[:, case.layer]).all())


def test_what_is_in_the_new_slot_is_not_read() -> None:
    case = random_step(batch=2, kv_heads=2, group=2, dim=64, seed=6)
    expected, _ = fused(case, "ratio")
    for sample in range(2):
        case.state.key_arena[sample, :, case.state.next_slot[sample, case.layer]] = 1e4
        case.state.value_arena[sample, :, case.state.next_slot[sample, case.layer]] = 1e4
    assert torch.equal(fused(case, "ratio")[0], expected)


def test_a_state_that_is_not_contiguous_is_refused() -> None:
    case = random_step(batch=2, kv_heads=2, group=1, dim=64)
    arena = case.state.key_arena.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(InternalError, match="key_arena of a compact cache must be contiguous"):
        fused_decode_step(case.query, case.key, case.value, case.state._replace(key_arena=arena), 0, 1.0, "ratio", 4)
