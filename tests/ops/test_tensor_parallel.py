"""The halves into which scoring and the decode step are cut, on one rank: there they are the whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.ops.prompts import Layer, make_layer, prefill_scores
from tests.passes.decoder import full_cache
from tests.passes.states import full_state
from tgvkv_compile.ops.attention.sdpa import scaled_dot_product_attention_with_lse
from tgvkv_compile.ops.cache.decode_step import decode_step
from tgvkv_compile.ops.cache.tensor_parallel import tensor_parallel_decode_step
from tgvkv_compile.ops.ranks import mean_over_ranks
from tgvkv_compile.ops.state import CompactState

STEP: dict[str, Any] = {"layer": 1, "scale": 0.5, "sink_tokens": 2}


@pytest.fixture
def group() -> Iterator[str]:
    """A group of one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def prompt() -> Layer:
    return make_layer(batch=2, heads=4, kv_heads=2, length=24, padding=(0, 3), mask="bool", dtype=torch.bfloat16)


def token() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, heads, 1, 4, generator=generator) for heads in (4, 2, 2))
    return query, key, value


def state(batch: int = 2) -> CompactState:
    return full_state(full_cache(7, batch=batch), slots=40, rate=0.5, protect_from=5)


@pytest.mark.parametrize("known", [True, False])
def test_scores_of_one_rank_are_the_scores(group: str, known: bool) -> None:
    layer = prompt()
    given = (layer.q, layer.k, layer.token_types, layer.attn_mask, layer.is_causal, layer.scale)
    _, lse = scaled_dot_product_attention_with_lse(layer.q, layer.k, layer.k, layer.attn_mask, layer.is_causal, layer.scale)
    lse = lse if known else None
    for got, wanted in zip(prefill_scores(*given, lse, group=group), prefill_scores(*given, lse), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_one_rank_is_the_step(group: str, decode: str, batch: int) -> None:
    split, whole = state(batch), state(batch)
    new = [part[:batch] for part in token()]
    got = tensor_parallel_decode_step(*new, split, decode=decode, group=group, **STEP)
    torch.testing.assert_close(got, decode_step(*new, whole, decode=decode, **STEP))
    for name, one, other in zip(CompactState._fields, split, whole, strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(split.slot_position, state(batch).slot_position)


def test_the_mean_keeps_its_shape(group: str) -> None:
    mean = torch.rand(2, 3, 5)
    torch.testing.assert_close(mean_over_ranks(mean, 3, group), mean)


def test_opcheck() -> None:
    given = state()
    attend = (*token(), *given, 1, 0.5)
    library.opcheck(torch.ops.tgvkv.attend_step.default, attend)
    evict = (torch.rand(2, 40), *given, 1, "ratio", 2)
    library.opcheck(torch.ops.tgvkv.evict_step.default, evict)
