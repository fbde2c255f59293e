"""A decode step of static shapes: the slot, the suffix and the eviction of the functions that the compiled path is made of."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.cache.segments import attend
from tgvkv_compile.ops.eviction.decode import choose_eviction, next_protected
from tgvkv_compile.ops.static.decode import LayerState, static_decode_step

CAPACITY = 12


def _cache(seed: int) -> dict[str, Any]:
    """Two samples whose slots are filled in any order, at least one of them free."""
    generator = torch.Generator().manual_seed(seed)
    slots, total = torch.full((2, CAPACITY), -1), torch.zeros(2, dtype=torch.int64)
    protect = torch.zeros(2, dtype=torch.int64)
    for sample in range(2):
        count = int(torch.randint(5, CAPACITY, (1,), generator=generator))
        total[sample] = count + int(torch.randint(0, 9, (1,), generator=generator))
        positions = torch.randperm(int(total[sample]) - 1, generator=generator)[: count - 1]
        positions = torch.cat([positions, total[sample : sample + 1] - 1])  # the last one is there
        places = torch.randperm(CAPACITY, generator=generator)[:count]
        slots[sample, places] = positions
        protect[sample] = positions.sort().values[int(torch.randint(1, count, (1,), generator=generator))]
    key, value = torch.randn(2, 2, 2, CAPACITY, 4, generator=generator)
    new = [torch.randn(2, heads, 1, 4, generator=generator) for heads in (4, 2, 2)]
    rate = torch.rand(2, generator=generator)
    rate[seed % 2] = 1.0 if seed % 5 == 0 else rate[seed % 2]
    return {"new": new, "key": key, "value": value, "slots": slots, "protect": protect, "rate": rate, "total": total}


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
@given(seed=st.integers(0, 2**31), sinks=st.sampled_from([0, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_steps_of_the_compiled_path(decode: str, seed: int, sinks: int) -> None:
    had = _cache(seed)
    query, key, value = had["new"]
    slots, total = had["slots"], had["total"]
    found = static_decode_step(
        query, key, value, LayerState(had["key"], had["value"], slots, had["protect"], had["rate"], total), 0.5, decode, sinks
    )

    free = [int((row < 0).nonzero()[0]) for row in slots]
    samples = torch.arange(2)
    filled, keys, values = slots.clone(), had["key"].clone(), had["value"].clone()
    filled[samples, free] = total
    keys[samples, :, free], values[samples, :, free] = key[:, :, 0], value[:, :, 0]
    output, attention = attend(query, keys, values, (filled >= 0)[:, None, None], 0.5)
    protected = next_protected(filled, had["protect"])
    config = EvictionConfig(decode=decode, sink_tokens=sinks)  # type: ignore[arg-type]
    length = (filled >= 0).sum(1)
    goes = choose_eviction(attention[:, 0], filled, length, total + 1, had["rate"], protected, config=config)
    left = filled.clone()
    for sample, slot in enumerate(goes.tolist()):
        if slot >= 0:
            left[sample, slot] = -1
    torch.testing.assert_close(found.output, output)
    assert torch.equal(found.key, keys) and torch.equal(found.value, values)
    assert torch.equal(found.slot_position, left)
    assert torch.equal(found.protect_from, protected)


def test_of_equal_attention_the_earlier_position_goes() -> None:
    had = _cache(3)
    query, key, value = (torch.zeros_like(tensor) for tensor in had["new"])
    slots = torch.tensor([[7, 3, 5, -1, 9, 4, 8, 6, 0, 1, 2, -1]] * 2)
    rate, protect, total = torch.tensor([0.1, 0.1]), torch.tensor([8, 8]), torch.tensor([10, 10])
    state = LayerState(torch.zeros_like(had["key"]), had["value"], slots, protect, rate, total)
    found = static_decode_step(query, key, value, state, 0.5, "ratio", 4)
    assert found.slot_position.tolist() == [[7, 3, 5, 10, 9, -1, 8, 6, 0, 1, 2, -1]] * 2
