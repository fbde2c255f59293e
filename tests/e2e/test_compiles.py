"""How often something is compiled: once per kind of graph, whatever the length of prompts and answers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.support.counting import of_generate
from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs

SHAPE = Shape(layers=2, seed=2)
SINGLE = ((5, 9),)
PADDED = ((5, 9), (3, 12))


class Counts:
    """Graphs that dynamo handed over, and rewritten graphs that were lowered."""

    def __init__(self) -> None:
        self.backend = tgvkv_backend(0.3, lowering="eager")
        self.lowered = 0

    def now(self) -> tuple[dict[str, int], int]:
        return of_generate(LlavaForConditionalGeneration, self.backend.graphs), self.lowered


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()
    lower = programs.lower_rewritten

    def counted(*args: Any, **options: Any) -> Any:
        counts.lowered += 1
        return lower(*args, **options)

    monkeypatch.setattr(programs, "lower_rewritten", counted)
    yield counts


def ask(model: Any, prompts: Any, tokens: int) -> Any:
    output = model.generate(**make_inputs(prompts), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    assert output.sequences.shape[1] == make_inputs(prompts)["input_ids"].shape[1] + tokens
    return output


def longer(prompts: Any, by: int) -> Any:
    return tuple((before + by % 3, *others[:-1], others[-1] + by) for before, *others in prompts)


@pytest.mark.parametrize(
    ("prompts", "lowering"),
    [(SINGLE, "eager"), (PADDED, "eager"), pytest.param(PADDED, "inductor", marks=pytest.mark.slow)],
    ids=["single", "padded", "padded-inductor"],
)
def test_one_prefill_and_one_decode_graph(counts: Counts, prompts: Any, lowering: Any) -> None:
    counts.backend = tgvkv_backend(0.3, lowering=lowering, growth_reserve=16)
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    ask(model, prompts, 3)
    assert counts.now() == ({"prefill": 1, "decode": 1}, 2)

    ask(model, prompts, 100)  # grows the arena more than once
    assert counts.now() == ({"prefill": 1, "decode": 1}, 2)

    ask(model, longer(prompts, 4), 3)  # the length becomes dynamic
    graphs, lowered = counts.now()
    assert graphs["decode"] == 1
    assert graphs["prefill"] <= 2
    assert set(graphs) == {"prefill", "decode"}
    assert lowered <= 3

    for by in range(5, 15):
        ask(model, longer(prompts, by), 3)
    assert counts.now() == (graphs, lowered)


def test_spans_share_a_graph_and_each_number_of_pictures_has_one(counts: Counts) -> None:
    """Where images stand is data. How many there are is the length of a list of transformers', which dynamo guards."""
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    for prompts in (SINGLE, ((6, 10),), ((2, 3, 9),), ((0, 3, 3, 6),)):
        ask(model, prompts, 2)
    graphs, lowered = counts.now()
    assert graphs == {"prefill": 4, "decode": 1} and lowered == 5  # for one picture a static length first
    for prompts in (((9, 1),), ((1, 7),), ((2, 8, 4),), ((7, 7, 1),), ((3, 2, 2, 9),), ((1, 0, 1, 1),)):
        ask(model, prompts, 2)
    assert counts.now() == (graphs, lowered)


def test_a_new_batch_size_is_compiled_once(counts: Counts) -> None:
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    for _ in range(2):
        for prompts in (SINGLE, PADDED):
            ask(model, prompts, 4)
        once = counts.now()
    ask(model, longer(PADDED, 1), 4)
    ask(model, longer(SINGLE, 2), 4)
    settled = counts.now()
    assert once[0]["decode"] == settled[0]["decode"] == 2
    for by in (3, 4, 5):
        for prompts in (SINGLE, PADDED):
            ask(model, longer(prompts, by), 4)
    assert counts.now() == settled


def test_the_count_sees_recompilations(counts: Counts) -> None:
    """Forgetting what was compiled makes all of it come again."""
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    ask(model, SINGLE, 3)
    torch._dynamo.reset()
    ask(model, SINGLE, 3)
    assert counts.now() == ({"prefill": 2, "decode": 2}, 4)
