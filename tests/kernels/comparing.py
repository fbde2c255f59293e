"""What a kernel of a decode step is held against."""

import torch
from torch import Tensor

from tests.kernels.cases import StepCase
from tgvkv_compile.ops import decode_step as op
from tgvkv_compile.ops.state import CompactState

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
