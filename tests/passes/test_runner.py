"""The runner of passes: their order, what they leave for each other, and that every edge is verified."""

from pathlib import Path

import pytest

from tests.passes.decoder import Decoder, capture, features, rewritten, tokens
from tgvkv_compile.errors import InternalError
from tgvkv_compile.export.trace.rewritten import STEPS as EXPORT_STEPS
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.passes.insert.insert_budgeting import insert_budgeting
from tgvkv_compile.passes.insert.insert_rebudgeting import insert_rebudgeting
from tgvkv_compile.passes.insert.insert_scoring import insert_scoring
from tgvkv_compile.passes.insert.insert_survivors import insert_survivors
from tgvkv_compile.passes.inserted import Budgets, Scores
from tgvkv_compile.passes.normalise_attention import normalise_attention
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.pipeline import COUNT_STEPS, STEPS
from tgvkv_compile.runner import Step, in_order, run_steps


@pytest.fixture
def scored() -> Rewrite:
    gm, inputs = capture(Decoder(), tokens(), features())
    return rewritten(gm, inputs, "insert_scoring")


def test_what_a_pass_requires_stands_before_it_in_the_list_of_its_kind() -> None:
    first, second = Step(normalise_attention), Step(insert_scoring, requires=(normalise_attention,))
    assert in_order(first, second) == (first, second)
    with pytest.raises(InternalError, match="insert_scoring requires normalise_attention before it"):
        in_order(second, first)
    # That it stands in the list of another kind of graph is not enough.
    again = Step(insert_rebudgeting, requires=(insert_survivors, normalise_attention))
    assert again in STEPS["vision_continuation"]
    with pytest.raises(InternalError, match="insert_rebudgeting requires insert_survivors before it"):
        in_order(*(step for step in STEPS["late_prefill"] if step.run is not insert_rebudgeting), again)


def test_every_list_is_checked() -> None:
    for steps in (COUNT_STEPS, *STEPS.values(), *EXPORT_STEPS.values()):
        assert in_order(*steps) == steps and len({step.name for step in steps}) == len(steps)


def test_a_record_that_nobody_left_is_named(scored: Rewrite) -> None:
    assert scored.has(Scores) and not scored.has(Budgets)
    with pytest.raises(InternalError, match="no pass left a Budgets of this prefill graph; there is ArenaSizes, Scores"):
        scored.get(Budgets)


def test_what_passes_leave_needs_no_user_yet(scored: Rewrite) -> None:
    scores = scored.get(Scores)
    assert {scores.token_types, *scores.mass, *scores.score, *scores.tier} <= scored.pending()


def test_it_stops_after_a_pass_and_dumps_the_graph_after_each(scored: Rewrite, tmp_path: Path) -> None:
    steps = [Step(insert_budgeting), Step(breaks)]
    run_steps(scored, steps, dumper=Dumper(tmp_path), stop_after="insert_budgeting")
    assert [file.name for file in tmp_path.iterdir()] == ["000-prefill-insert_budgeting.py"]
    assert scored.has(Budgets)


def test_a_pass_that_breaks_the_graph_is_named(scored: Rewrite) -> None:
    with pytest.raises(InternalError, match="pass 'breaks' left"):
        run_steps(scored, [Step(breaks)])


def breaks(rewrite: Rewrite) -> None:
    del rewrite.get(Scores).token_types.meta["example_value"]
