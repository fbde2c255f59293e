"""The functions trace with symbolic sizes and compute the same then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.prompts import make_layer, prefill_scores, vision_at
from tgvkv_compile.config import Budgeting, EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import allocate, segment_capacity
from tgvkv_compile.ops.eviction.decode import choose_eviction, next_protected
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import classify_tokens, vision_count


def _prefill(config: EvictionConfig) -> Callable[..., tuple[Tensor, ...]]:
    def prefill(q: Tensor, k: Tensor, vision: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        token_types = classify_tokens(vision, valid)
        scored = [prefill_scores(layer_q, k, token_types, None, True, 0.5) for layer_q in (q, 2 * q)]
        mass = torch.stack([mass for mass, _ in scored], dim=1)
        kept, rate = allocate(mass, token_types.lengths, vision_count(token_types, config=config), config=config)
        keeps = [
            select_tokens(score, text_first(token_types), token_types, kept[:, layer], sink_tokens=config.sink_tokens)
            for layer, (_, score) in enumerate(scored)
        ]
        return (*keeps, rate, segment_capacity(kept, rate, token_types.lengths, 32, config=config))

    return prefill


def _arguments(batch: int, length: int) -> tuple[Tensor, ...]:
    padding = tuple(range(batch))
    vision = vision_at(length, (length // 4, length // 2)).expand(batch, -1).clone()
    layer = make_layer(batch=batch, length=length, padding=padding, vision=vision, seed=length)
    return layer.q, layer.k, layer.token_types.vision, layer.token_types.valid


def _same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("budgeting", ["tvb", "waterfill", "uniform"])
@pytest.mark.parametrize("budget_of", ["all", "vision"])
def test_prefill_traces_with_symbolic_sizes(budgeting: Budgeting, budget_of: Any) -> None:
    prefill = _prefill(EvictionConfig(budget=0.3, budgeting=budgeting, budget_of=budget_of))
    graph = make_fx(prefill, tracing_mode="symbolic")(*_arguments(3, 40))
    assert [node.target for node in graph.graph.nodes].count(torch.ops.tgvkv.weigh.default) == 4  # two walks a layer
    for batch, length in [(3, 40), (2, 57), (5, 33)]:
        _same(graph(*_arguments(batch, length)), prefill(*_arguments(batch, length)))


@torch._dynamo.config.patch(specialize_float=True)  # as the backend has it
def test_prefill_compiles_with_dynamic_sizes_once() -> None:
    prefill = _prefill(EvictionConfig(budget=0.3))
    compiled = torch.compile(prefill, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch, length in [(3, 40), (2, 57)]:
        _same(compiled(*_arguments(batch, length)), prefill(*_arguments(batch, length)))


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
def test_decode_traces_with_symbolic_sizes(decode: Any) -> None:
    config = EvictionConfig(decode=decode)

    def step(attention: Tensor, positions: Tensor, total: Tensor, rate: Tensor, protect: Tensor) -> tuple[Tensor, Tensor]:
        protect = next_protected(positions, protect)
        length = (positions >= 0).sum(1)
        return protect, choose_eviction(attention, positions, length, total, rate, protect, config=config)

    def arguments(batch: int, slots: int) -> tuple[Tensor, ...]:
        positions = torch.arange(slots).expand(batch, -1).clone()
        positions[:, slots // 2] = -1
        total, rate = torch.full((batch,), slots), torch.linspace(0.1, 1.0, batch)
        return torch.rand(batch, slots), positions, total, rate, torch.full((batch,), slots - 4)

    graph = make_fx(step, tracing_mode="symbolic")(*arguments(3, 20))
    for batch, slots in [(3, 20), (4, 31)]:
        given = arguments(batch, slots)
        _same(graph(*given), step(*given))
