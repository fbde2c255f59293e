"""What kernels are held against."""

from typing import Any

import torch
from torch import Tensor

from tests.kernels.cases import StepCase
from tests.ops.prompts import Layer
from tgvkv_compile.ops import decode_step as op
from tgvkv_compile.ops.attention_rows import AttentionRows
from tgvkv_compile.ops.policy.rank import rank_by_walk, scores_from_attention
from tgvkv_compile.ops.roles import Roles
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.ops.weighing import Weighed, plain_weigh

NOISE = 1e-5
"""Relative difference of attentions below which float32 may order them either way."""


def plain(case: StepCase, decode: str, sink: int = 4) -> tuple[Tensor, CompactState]:
    state = case.fresh()
    return op._decode_step(case.query, case.key, case.value, *state, case.layer, case.scale, decode, sink), state


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


def same_books(actual: CompactState, expected: CompactState) -> None:
    for name, got, wanted in zip(CompactState._fields, actual, expected, strict=True):
        assert torch.equal(got, wanted), name


def exact_scores(layer: Layer) -> tuple[Tensor, Tensor, Tensor, float]:
    """In float64: the log-sum-exp `[B, H, N]`, mass `[B]`, score `[B, N]` and the largest logit."""
    group = layer.q.shape[1] // layer.k.shape[1]
    visible = layer.visible()
    logits = layer.q.double() @ layer.k.double().repeat_interleave(group, dim=1).transpose(2, 3) * layer.scale
    largest = float(logits.abs().max())
    logits = logits.masked_fill(~visible, float("-inf"))
    attention = logits.softmax(-1).nan_to_num().mean(1)
    mass, score = scores_from_attention(attention, visible.any(1), layer.roles)
    return logits.logsumexp(-1), mass, score, largest


def scores(weigh: Any, rows: AttentionRows, roles: Roles) -> tuple[Tensor, Tensor]:
    """Mass and scores by one implementation of the op."""

    def walk(asked: Any) -> list[Weighed]:
        return [Weighed(*weigh(weights.unsqueeze(1), wanted, rows)) for weights, wanted in asked]

    ranks = rank_by_walk(rows.k, roles, rows.q.shape[2], walk)
    return ranks.mass, ranks.score


def unfused_weigh(weights: Tensor, wanted: Tensor | None, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    return plain_weigh(weights, wanted, *rows)
