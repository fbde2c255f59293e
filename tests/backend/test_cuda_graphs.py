"""`mode="reduce-overhead"`: a decode step is a graph that can be recorded once and replayed. Shown on the CPU."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import kept_of
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.meta import fake_value
from tgvkv_compile.lower import lowered
from tgvkv_compile.ops.state import CompactState

BUDGET = 0.3
SHAPE = Shape(layers=2, seed=7)
PROMPTS = ((5, 9), (3, 14))
STEPS = 6
GRAPHS = "triton.cudagraphs"

Run = Callable[..., list[Any]]


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GraphModule, dict[str, Any], list[tuple[Any, ...]]]]:
    """Graphs on the way to Inductor, the options they come with, and the inputs of every call. They run as they are."""
    seen: list[tuple[GraphModule, dict[str, Any], list[tuple[Any, ...]]]] = []

    def watched(gm: GraphModule, inputs: list[Any], patches: dict[str, Any], fake_mode: object) -> Run:
        calls: list[tuple[Any, ...]] = []
        seen.append((gm, patches, calls))

        def run(*given: Any) -> list[Any]:
            calls.append(given)
            return list(gm.forward(*given))

        return run

    monkeypatch.setitem(lowered._BACKENDS, "inductor", watched)
    monkeypatch.setattr(programs, "REPLAYING", ("cpu",))
    return seen


def compiled(**options: Any) -> Any:
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(BUDGET, **{"mode": "reduce-overhead", "growth_reserve": 16, **options}))
    return model


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return model.generate(**inputs, max_new_tokens=STEPS + 1, do_sample=False, return_dict_in_generate=True)


def steps_of(lowerings: list[Any]) -> list[Any]:
    """The decode graphs."""
    return [one for one in lowerings if any("decode_step" in str(node.target) for node in one[0].graph.nodes)]


def test_no_input_of_a_step_depends_on_how_far_the_answer_is(lowerings: list[Any]) -> None:
    """A CUDA graph is recorded anew for every other shape and every other int."""
    inputs = make_inputs(PROMPTS)
    generate(compiled(), inputs)
    ((gm, patches, calls),) = steps_of(lowerings)
    assert patches[GRAPHS] is True and len(calls) == STEPS
    shapes = {tuple(x.shape if isinstance(x, torch.Tensor) else x for x in call) for call in calls}
    assert len(shapes) == 1
    # How many samples there are is the only int: the same in every step.
    assert [x for x in calls[0] if isinstance(x, int)] in ([], [len(PROMPTS)])
    for node in gm.graph.find_nodes(op="placeholder"):
        assert node.users, f"{node.name} is of no use"
        if isinstance(fake_value(node), torch.SymInt):
            assert fake_value(node).node.hint == len(PROMPTS), f"{node.name} is a size that is no number of samples"


def test_a_step_reads_nothing_on_the_host(lowerings: list[Any]) -> None:
    """No `.item()`, no size that depends on data, no copy to the CPU."""
    generate(compiled(), make_inputs(PROMPTS))
    ((gm, *_),) = steps_of(lowerings)
    waiting = (".item", "local_scalar", "nonzero", "tolist", "cpu", "masked_select")
    for node in gm.graph.nodes:
        assert not any(what in str(node.target) for what in waiting), node.target
        value = node.meta.get("example_value", node.meta.get("val"))
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        symbols = {str(symbol) for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
        assert not any(symbol.startswith("u") for symbol in symbols), f"{node.name} has a size that data decides"


def test_the_state_is_written_in_place_at_static_addresses(lowerings: list[Any]) -> None:
    model, inputs = compiled(), make_inputs(PROMPTS)
    for _ in range(3):
        generate(model, inputs)
        gc.collect()
    ((gm, _, calls),) = steps_of(lowerings)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    state = [names.index(f"tgvkv_{name}") for name in CompactState._fields]
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name.startswith("tgvkv_"):
            assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
    assert len(calls) == 3 * STEPS
    assert len({tuple(call[index].data_ptr() for index in state) for call in calls}) == 1
    weights = [index for index, name in enumerate(names) if "weight" in name]
    assert weights and len({tuple(call[index].data_ptr() for index in weights) for call in calls}) == 1


def test_only_steps_become_cuda_graphs(lowerings: list[Any]) -> None:
    """A prompt's shape comes once, and what it returns must outlive the next prompt."""
    generate(compiled(), make_inputs(PROMPTS))
    prefills = [one for one in lowerings if any("rank_tokens" in str(node.target) for node in one[0].graph.nodes)]
    assert [patches[GRAPHS] for _, patches, _ in prefills] == [False] * len(prefills)
    assert prefills


def test_requests_are_the_reference_and_leave_each_other_alone(lowerings: list[Any]) -> None:
    inputs = make_inputs(PROMPTS)
    expected = reference(make_model(SHAPE), inputs, STEPS, config=EvictionConfig(BUDGET), image_token=IMAGE)
    model = compiled(growth_reserve=3)  # arenas grow on the way
    first = generate(model, inputs)
    second = generate(model, inputs)
    for output in (first, second):
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected.continuation)
        assert kept_of(output.past_key_values) == expected.kept[-1]


@pytest.mark.parametrize("options", [{"mode": None}, {"mode": None, "options": {GRAPHS: False}}], ids=["no mode", "off"])
def test_other_modes_move_nothing(options: dict[str, Any], lowerings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: Any) -> None:
        raise AssertionError("no CUDA graph was asked for")

    monkeypatch.setattr(programs.ArenaPool, "settle", moved)
    generate(compiled(**options), make_inputs(PROMPTS))
    assert steps_of(lowerings)
    assert not any(patches.get(GRAPHS) for _, patches, _ in steps_of(lowerings))
