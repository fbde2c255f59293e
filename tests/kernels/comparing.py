"""What kernels are held against."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.kernels.bounds import check_bounded
from tests.kernels.cases import StepCase, random_step
from tests.ops.prompts import Layer
from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.cache import decode_step as op
from tgvkv_compile.ops.policy.rank import rank_by_walk, scores_from_attention
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.ops.token_types import TokenTypes
from tgvkv_compile.ops.weighing import Weighed, plain_weigh

Step = Callable[..., Tensor]
"""Takes query, key, value, state, layer, scale, `decode` and the number of sinks, as `fused_decode_step` does."""
NOISE = 1e-5
"""Relative difference of attentions below which float32 may order them either way."""


def plain(case: StepCase, decode: str, sink: int = 4) -> tuple[Tensor, CompactState]:
    state = case.fresh()
    options = (case.layer, case.scale, decode, sink, case.kv_dtype)
    return op._decode_step(case.query, case.key, case.value, *state, *options), state


def decided(case: StepCase, sink: int = 4) -> bool:
    """Whether no two entries that may go are within noise of each other at the bottom."""
    _, attention, positions, _ = case.exact()
    protected = case.state.protect_from[:, case.layer]
    for sample in range(len(attention)):
        above = positions[sample][positions[sample] > protected[sample]]
        limit = above.min() if len(above) else protected[sample]
        evictable = (positions[sample] >= sink) & (positions[sample] < limit)
        two = attention[sample][evictable].sort().values[:2]
        if len(two) == 2 and float(two[1] - two[0]) <= NOISE * float(two[1]):
            return False
    return True


def same_books(actual: CompactState, expected: CompactState, kv_dtype: KVDtype | None = None) -> None:
    for name, got, wanted in zip(CompactState._fields, actual, expected, strict=True):
        if kv_dtype is not None and name.endswith("arena"):
            same_rows(got, wanted, kv_dtype)
        else:
            assert torch.equal(got, wanted), name


def same_rows(actual: Tensor, expected: Tensor, kv_dtype: KVDtype) -> None:
    """Rows of codes; a rotation in another order may round a number to the next code, or a scale to the next of float16."""
    off = actual != expected
    assert float(off.any(-1).float().mean()) < 0.02, "many rows differ"
    got, wanted = actual[off].int(), expected[off].int()
    near = (got - wanted).abs() <= 1
    if kv_dtype == "int4":
        near |= ((got & 15) - (wanted & 15)).abs() + ((got >> 4) - (wanted >> 4)).abs() <= 1
    assert bool(near.float().mean() > 0.9) if len(near) else True


def check_step(step: Step, case: StepCase, decode: str, sink: int = 4) -> None:
    """One step, from the output to the books."""
    state = case.fresh()
    quantised = () if case.kv_dtype is None else (case.kv_dtype,)
    output = step(case.query, case.key, case.value, state, case.layer, case.scale, decode, sink, *quantised)
    expected, books = plain(case, decode, sink)
    exact, _, _, largest = case.exact()
    check_bounded(output, expected, exact, largest_logit=largest)
    assert output.is_contiguous() and output.shape == case.query.shape
    same_books(state if decided(case, sink) else CompactState(*state[:2], *books[2:]), books, case.kv_dtype)


def check_many_steps(step: Step, decode: str, dtype: torch.dtype = torch.float32) -> None:
    """Twelve steps of two layers, the books compared after each."""
    case = random_step(batch=2, kv_heads=1, group=2, dim=64, layers=2, longest=30, seed=3, dtype=dtype)
    ours, theirs = case.fresh(), case.fresh()
    for _ in range(12):
        new = [torch.randn(2, heads, 1, 64, dtype=dtype) for heads in (2, 1, 1)]
        for layer in range(2):
            got = step(*new, ours, layer, 0.125, decode, 4)
            expected = op._decode_step(*new, *theirs, layer, 0.125, decode, 4)
            torch.testing.assert_close(got, expected)
        same_books(ours, theirs)
        ours, theirs = (state._replace(lengths=state.lengths + 1) for state in (ours, theirs))
    moved = ours.segment_len - case.state.segment_len
    assert bool((moved == 12).all()) if decode == "keep" else bool((moved < 12).any())


def exact_scores(layer: Layer) -> tuple[Tensor, Tensor, Tensor, float]:
    """In float64: the log-sum-exp `[B, H, N]`, mass `[B]`, score `[B, N]` and the largest logit."""
    group = layer.q.shape[1] // layer.k.shape[1]
    visible = layer.visible()
    logits = layer.q.double() @ layer.k.double().repeat_interleave(group, dim=1).transpose(2, 3) * layer.scale
    largest = float(logits.abs().max())
    logits = logits.masked_fill(~visible, float("-inf"))
    attention = logits.softmax(-1).nan_to_num().mean(1)
    mass, score = scores_from_attention(attention, visible.any(1), layer.token_types)
    return logits.logsumexp(-1), mass, score, largest


def scores(weigh: Any, rows: AttentionRows, token_types: TokenTypes) -> tuple[Tensor, Tensor]:
    """Mass and scores by one implementation of the op."""

    def walk(asked: Any) -> list[Weighed]:
        return [Weighed(*weigh(weights.unsqueeze(1), wanted, rows)) for weights, wanted in asked]

    ranks = rank_by_walk(rows.k, token_types, rows.q.shape[2], walk)
    return ranks.mass, ranks.score


def unfused_weigh(weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    return plain_weigh(weights, wanted, *rows)


def check_scores(weigh: Any, layer: Layer) -> None:
    """Mass and scores of TGV-KV by `weigh`, which takes weights, wanted columns and [`AttentionRows`][]."""
    lse, mass, score, largest = exact_scores(layer)
    rows = layer.rows(lse.float())
    plain, fused = (scores(one, rows, layer.token_types) for one in (unfused_weigh, weigh))
    check_bounded(fused[0], plain[0], mass, largest_logit=largest)
    check_bounded(fused[1], plain[1], score, largest_logit=largest)
    assert bool((fused[1][~layer.token_types.valid] == 0).all())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
