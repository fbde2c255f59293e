"""Random models, options and prompts: an exported graph on ONNX Runtime is the reference, call by call."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.engines import check_files, run_engine
from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.export import BudgetPlan, OnnxGenerator, export_onnx

STEPS = 6
LONGEST = 90


@dataclasses.dataclass(frozen=True)
class Case:
    """What is exported. An export takes ten seconds, so many prompts are run on each.

    Attributes:
        shape: Of the model.
        config: The eviction options.
        batch: B.
        blocks: How many blocks the rows of attention are walked in.
    """

    shape: Shape
    config: EvictionConfig
    batch: int = 2
    blocks: int = 1


CASES = {
    "paper": Case(Shape(layers=3, seed=11), EvictionConfig(0.3)),
    "waterfill": Case(Shape(layers=2, heads=3, kv_heads=1, seed=12), EvictionConfig(11, budgeting="waterfill", decode="fixed")),
    "vision": Case(
        Shape(layers=2, heads=2, kv_heads=2, head_dim=4, seed=13),
        EvictionConfig(0.25, budget_of="vision", decode="keep", sink_tokens=2),
        batch=1,
    ),
    "blocks": Case(
        Shape(layers=2, heads=4, kv_heads=4, side=5, seed=14, attention="eager"),
        EvictionConfig(0.2, budgeting="uniform", sink_tokens=0),
        blocks=3,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, OnnxGenerator]:
    case = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = make_model(case.shape)
    sample = make_inputs([(4, 9)] * case.batch, side=case.shape.side)
    # Room for everything, so that budgets alone decide.
    plan = BudgetPlan((LONGEST + STEPS,) * case.shape.layers, LONGEST, STEPS, case.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgvkv_compile.export.program.block_count", lambda *_: case.blocks)
        export_onnx(model, sample, folder, plan=plan)
    return case, model, OnnxGenerator(folder)


@st.composite
def prompts(draw: st.DrawFn, batch: int, pictures: int) -> tuple[tuple[int, ...], ...]:
    """`pictures` of them, somewhere in the batch; a sample may have none, but not be empty."""
    where = draw(st.lists(st.integers(0, batch - 1), min_size=pictures, max_size=pictures))
    made = []
    for sample in range(batch):
        count = where.count(sample)
        texts = draw(st.lists(st.integers(0, 14), min_size=count + 1, max_size=count + 1))
        made.append(tuple(texts) if count else (max(1, texts[0]),))
    return tuple(made)


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_an_engine_is_the_reference(exported: tuple[Case, Any, OnnxGenerator], data: st.DataObject) -> None:
    case, model, generator = exported
    given_prompts = data.draw(prompts(case.batch, case.batch))
    inputs = make_inputs(given_prompts, side=case.shape.side, seed=data.draw(st.integers(0, 1000)))
    expected = reference(model, inputs, STEPS, config=case.config, image_token=IMAGE)
    found = run_engine(generator, inputs, STEPS, forced=expected.tokens)
    assert_same_run(found, expected)


def test_files_are_what_was_asked_for(exported: tuple[Case, Any, OnnxGenerator]) -> None:
    case, _, generator = exported
    assert generator.manifest.prompt_lengths.multiple == case.blocks
    check_files(generator)
    assert torch.tensor(generator.manifest.plan.capacities).unique().tolist() == [LONGEST + STEPS]
