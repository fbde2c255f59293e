"""Pieces of a graph, each run as it stands: what the chain of them computes, and how many kinds there are."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tests.families.family import IMAGE as FAMILY_IMAGE
from tests.families.family import make_inputs as family_inputs
from tests.families.family import make_model as family_model
from tests.families.table import FAMILIES
from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import Session, reference, reference_turn
from tests.support.running import run, second_turn, traced_generate
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.environment import Environment
from tgvkv_compile.lower import lowered
from tgvkv_compile.lower.chain import Chain, Link

CONFIG = EvictionConfig(0.3)
SINGLE = ((5, 9),)
PADDED = ((5, 9), (3, 2, 12))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that Inductor would be given, here run as they stand."""
    graphs: list[GraphModule] = []

    def as_it_stands(gm: GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setitem(lowered._BACKENDS, "inductor", as_it_stands)
    return graphs


@pytest.mark.parametrize("prompts", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("options", [{}, {"prefill_cap": 2.0}, {"decode": "keep"}], ids=["plain", "capped", "keep"])
def test_a_chain_of_pieces_does_what_the_graph_does(compiled: list[GraphModule], prompts: Any, options: Any) -> None:
    shape = Shape(layers=5, seed=2)
    inputs = make_inputs(prompts)
    config = EvictionConfig(0.3, decode=options.get("decode", "ratio"))
    expected = reference(make_model(shape), inputs, 4, config=config, image_token=IMAGE)
    model = make_model(shape)
    model.compile(backend=tgvkv_backend(0.3, growth_reserve=2, **options))
    assert_same_run(run(model, inputs, 4), expected)
    assert len(compiled) == 8  # prefill: before, a layer, last layer, eviction, end; decode: before, a layer, last layer


def test_later_turns(compiled: list[GraphModule]) -> None:
    shape, question = Shape(layers=4, seed=1), torch.tensor([[7, 8, 9]])
    first = reference(make_model(shape), make_inputs(SINGLE), 2, config=CONFIG, image_token=IMAGE)
    expected = reference_turn(first, question, 2)
    model = make_model(shape)
    model.compile(backend=tgvkv_backend(0.3))
    trace = run(model, make_inputs(SINGLE), 2)
    before = len(compiled)
    assert_same_run(second_turn(model, trace.cache, trace.mask, question, 2), expected)
    assert len(compiled) - before == 3  # before, a layer, last layer


def test_more_layers_make_no_more_pieces(compiled: list[GraphModule]) -> None:
    counts = []
    for layers in (3, 4, 9):
        torch._dynamo.reset()
        before = len(compiled)
        model = make_model(Shape(layers=layers))
        model.compile(backend=tgvkv_backend(0.3))
        run(model, make_inputs(PADDED), 2)
        counts.append(len(compiled) - before)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "qwen2_5_vl"])
def test_layers_of_several_kinds(compiled: list[GraphModule], name: str) -> None:
    """Sliding and full windows, features that are added behind some layers: one piece of each kind, and nothing mixed up."""
    family = FAMILIES[name]
    inputs = family_inputs(family, family_model(family), ((5, "image", 9),), seed=3)
    expected = Session(family_model(family), CONFIG, image_token=FAMILY_IMAGE).generate(inputs, 3)
    model = family_model(family)
    model.compile(backend=tgvkv_backend(0.3))
    assert_same_run(traced_generate(model, inputs, 3), expected)
    assert compiled


def test_a_chain_lets_go_what_no_later_link_reads() -> None:
    made: list[Any] = []

    def double(x: Tensor) -> tuple[Tensor]:
        gc.collect()
        alive.append([ref() is not None for ref in made])
        result = x * 2
        made.append(weakref.ref(result))
        return (result,)

    alive: list[list[bool]] = []
    links = [Link(double, (0,), (2,), ()), Link(double, (2,), (3,), (2,)), Link(double, (3,), (4,), (3,))]
    chain = Chain(links, 1, [7], 5, [4, None, 1])
    found = chain(torch.ones(2))
    assert found[0].tolist() == [8.0, 8.0] and found[1:] == [None, 7]
    assert alive == [[], [True], [False, True]]


def test_what_is_assumed_of_one_layer_must_hold_for_all() -> None:
    environment = Environment()
    number = environment.number("layer", [0, 1, 2])
    assert bool(number < 3)
    assert environment.guards_on([]) is None
    assert bool(number == 2)
    with pytest.raises(InternalError, match="lowering assumed"):
        environment.guards_on([])
