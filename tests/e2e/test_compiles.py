"""How often something is compiled: once per kind of graph, whatever the length of prompts and answers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.support.counting import of_generate
from tests.support.models import IMAGE, Shape, make_inputs, make_model
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

    for by in range(4, 15):  # lengths are dynamic from the first call on
        ask(model, longer(prompts, by), 3)
    assert counts.now() == ({"prefill": 1, "decode": 1}, 2)


def test_spans_and_numbers_of_pictures_share_a_graph(counts: Counts) -> None:
    """Where images stand is data, and so is how many there are: they are merged before the graph begins."""
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    for prompts in (SINGLE, ((6, 10),), ((2, 3, 9),), ((0, 3, 3, 6),), ((9, 1),), ((2, 8, 4),), ((1, 0, 1, 1),)):
        ask(model, prompts, 2)
        assert counts.now() == ({"prefill": 1, "decode": 1}, 2)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 4, 1)])
def test_one_more_graph_when_batches_come_in_any_order(counts: Counts, order: tuple[int, ...]) -> None:
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    for batch in order:
        ask(model, ((5, 9),) * batch, 4)
        ask(model, ((4, 12), *((5, 9),) * (batch - 1)), 4)
    assert counts.now() == ({"prefill": 2, "decode": 2}, 4)


def test_a_text_only_prompt_adds_graphs_of_its_own_and_changes_none(counts: Counts) -> None:
    model = make_model(SHAPE)
    model.compile(backend=counts.backend)
    text = make_inputs(SINGLE)["input_ids"].clamp(max=IMAGE - 1)
    stock = make_model(SHAPE)
    for length in (8, 11, 14):
        ask(model, longer(SINGLE, length), 3)
        part = text[:, :length]
        found = model.generate(part, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, stock.generate(part, max_new_tokens=3, do_sample=False))
    graphs, lowered = counts.now()
    assert graphs["prefill"] == graphs["decode"] == 1 and lowered == 2
    assert graphs["dense"] <= 3  # as torch.compile: the prompt, the first step, steps of any length


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
