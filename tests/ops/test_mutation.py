"""Ops that write to their arguments compute compiled what they compute eagerly, however the arguments came about.

The compiler makes such an op functional, merges equal expressions and drops copies, then writes in place again. Tensors that
were apart must be apart after that, and views of one storage must see each other's writes. Issue 198031 of pytorch reports
wrong results of other mutating ops whose arguments alias after that, in torch 2.14 and a nightly of 2.15.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.decoder import full_cache
from tests.passes.states import full_state
from tgvkv_compile.ops.cache.continue_step import continue_step
from tgvkv_compile.ops.cache.decode_step import decode_step
from tgvkv_compile.ops.state import CompactState

BATCH, LAYERS, SLOTS, ROUNDS = 2, 2, 48, 2
BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))

Step = Callable[[CompactState, int, int], Tensor]
Build = Callable[[CompactState], CompactState]


def tokens(count: int) -> list[tuple[Tensor, ...]]:
    """Queries, keys and values of `count` tokens, for every round and layer."""
    generator = torch.Generator().manual_seed(count)
    return [
        tuple(torch.randn(BATCH, heads, count, 4, generator=generator) for heads in (4, 2, 2)) for _ in range(ROUNDS * LAYERS)
    ]


SINGLE, SEVERAL = tokens(1), tokens(3)


def decode(state: CompactState, layer: int, number: int) -> Tensor:
    return decode_step(*SINGLE[number], state, layer=layer, scale=0.5, decode="fixed", sink_tokens=2)


def go_on(state: CompactState, layer: int, number: int) -> Tensor:
    return continue_step(*SEVERAL[number], None, state, layer=layer, scale=0.5)


def in_halves(state: CompactState, layer: int, number: int) -> Tensor:
    """As `tensor_parallel_decode_step`, without the mean over ranks."""
    output, attention = torch.ops.tgvkv.attend_step(*SINGLE[number], *state, layer, 0.5)
    torch.ops.tgvkv.evict_step(attention, *state, layer, "fixed", 2)
    return output


def apart(state: CompactState) -> CompactState:
    return state


def views_of_one_storage(state: CompactState) -> CompactState:
    key, value = torch.stack([state.key_arena, state.value_arena]).unbind()
    books = torch.stack([state.segment_start, state.segment_len, state.next_slot, state.protect_from]).unbind()
    return CompactState(key, value, state.slot_position.clone(), *books, state.keep_rate, state.lengths)


def equal_expressions(state: CompactState) -> CompactState:
    """Arenas, and all that is written of the books, by expressions that are equal in pairs."""
    full = torch.full_like(state.segment_len, 7)
    return state._replace(
        key_arena=torch.ones_like(state.key_arena),
        value_arena=torch.ones_like(state.key_arena),
        segment_len=torch.full_like(full, 7),
        next_slot=state.segment_start + full,
        protect_from=state.segment_start * 0 + 7,
    )


def equal_slots(state: CompactState) -> CompactState:
    """`next_slot`, `segment_len` and `protect_from` begin as one and the same sum."""
    own = [state.segment_start + 7 for _ in range(3)]
    return state._replace(segment_len=own[0] - state.segment_start, next_slot=own[1], protect_from=own[2])


def copies(state: CompactState) -> CompactState:
    """Copies that no one would need if nothing wrote to them; equal ones in pairs."""
    return CompactState(*(part.clone() for part in state))._replace(value_arena=state.key_arena.clone())


def graph_of(step: Step, build: Build) -> Callable[..., tuple[Tensor, ...]]:
    """Two rounds over all layers. Gives the outputs, the state that was written to, and what it was made of."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        state = build(CompactState(*given))
        outputs = [step(state, layer, LAYERS * turn + layer) for turn in range(ROUNDS) for layer in range(LAYERS)]
        return (*outputs, *(part.clone() for part in state), *(part + 0 for part in given))

    return run


def start() -> CompactState:
    return full_state(full_cache(7, batch=BATCH, layers=LAYERS), slots=SLOTS, rate=0.5, protect_from=5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [apart, views_of_one_storage, equal_expressions, equal_slots, copies])
@pytest.mark.parametrize("step", [decode, go_on, in_halves])
def test_compiled_as_eager(step: Step, build: Build, backend: str) -> None:
    run = graph_of(step, build)
    expected, got = start(), start()
    wanted = run(*expected)
    outputs = torch.compile(run, backend=backend, fullgraph=True)(*got)
    for number, (one, other) in enumerate(zip(outputs, wanted, strict=True)):
        torch.testing.assert_close(one, other, msg=lambda text, number=number: f"output {number}: {text}")
    for name, one, other in zip(CompactState._fields, got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [decode, go_on, in_halves])
def test_results_that_are_written_to_later_are_apart(step: Step, backend: str) -> None:
    """A graph that makes a state out of equal expressions hands out tensors that a later graph may write to one by one."""

    def make(*given: Tensor) -> tuple[Any, ...]:
        return tuple(equal_slots(equal_expressions(CompactState(*given))))

    made = CompactState(*torch.compile(make, backend=backend, fullgraph=True)(*start()))
    wanted = CompactState(*make(*start()))
    for layer in range(LAYERS):
        torch.testing.assert_close(step(made, layer, layer), step(wanted, layer, layer))
    for name, one, other in zip(CompactState._fields, made, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
