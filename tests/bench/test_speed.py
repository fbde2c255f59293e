"""Eviction is faster than what a user would use instead. Bounds are loose: other tests may run meanwhile."""

import dataclasses
import statistics

import pytest
import torch

from bench.contenders import make_contenders
from bench.models import make_model, make_prompt
from bench.presets import PRESETS
from bench.requests import Request

# A cache as large as a real one's beside two small layers: what is left to measure is attention.
PRESET = dataclasses.replace(
    PRESETS["llava-next-cpu"],
    **{"layers": 2, "hidden": 256, "feed_forward": 512, "vocabulary": 500, "context": 4 * 576 + 48, "batch": 2},
)
WARM_UP = 4
ROUNDS = 7


@pytest.mark.slow
def test_a_step_is_faster_than_with_the_full_cache() -> None:
    torch.set_num_threads(1)  # others may be busy
    model = make_model(PRESET)
    prompt = make_prompt(model, PRESET, PRESET.batch)
    contenders = make_contenders(("inductor-full", "tgvkv", "floor"), model, PRESET, 0.05)
    requests = {one.name: Request(one, PRESET, prompt, room=64) for one in contenders}
    times: dict[str, list[float]] = {name: [] for name in requests}
    for number in range(WARM_UP + ROUNDS):
        for name, request in requests.items():
            seconds = request.decode(2)
            if number >= WARM_UP:
                times[name].append(seconds)
    full, ours, floor = (statistics.median(times[name]) for name in ("inductor-full", "tgvkv", "floor"))
    assert ours <= 0.7 * full
    assert ours <= 2 * floor
