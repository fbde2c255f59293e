"""Rankings in compiled models: by name against the oracle, functions as `docs/policies.md` says, errors that name them."""

import functools
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference, reference_turn
from tests.support.running import kept_of, run, second_turn
from tests.support.sharing import Sharing
from tgvkv_compile import explain, inspect_cache, tgvkv_backend
from tgvkv_compile.config import Budgeting, EvictionConfig
from tgvkv_compile.config import Ranking as RankingName
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.ops.eviction.budgeting import SHARINGS
from tgvkv_compile.policy import RANKINGS, Layer, Ranked, uniform

SHAPE = Shape(layers=3, seed=3)
PADDED = ((5, 9), (3, 2, 12))
PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


@functools.cache
def sharing() -> Sharing:
    return Sharing(make_model(SHAPE), tgvkv_backend(0.4, lowering="eager"))


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test: they share what dynamo traced."""
    torch.manual_seed(0)


def compiled(ranking: Any, **options: Any) -> Any:
    """One model in whichever way it was compiled last: it must have answered before it is compiled otherwise."""
    sharing().asked = tgvkv_backend(**{"budget": 0.4, "ranking": ranking, "lowering": "eager", **options})
    return sharing().model


@pytest.mark.parametrize("prompts", [((5, 9),), PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("name", sorted(set(RANKINGS) - {"knorm"}))
def test_a_named_ranking_is_the_oracles(name: Any, prompts: Any) -> None:
    inputs = make_inputs(prompts)
    expected = reference(make_model(SHAPE), inputs, 4, config=EvictionConfig(0.4, ranking=name), image_token=IMAGE)
    assert_same_run(run(compiled(name), inputs, 4), expected)


@pytest.mark.parametrize(
    "options", [{"prefill_cap": 4.0}, {"budget_of": "vision"}, {"decode": "keep"}, {"budgeting": "waterfill"}], ids=str
)
def test_a_ranking_beside_other_options(options: Any) -> None:
    config = EvictionConfig(0.4, ranking="snapkv", **{name: value for name, value in options.items() if name != "prefill_cap"})
    inputs = make_inputs(PADDED)
    expected = reference(make_model(SHAPE), inputs, 3, config=config, image_token=IMAGE)
    assert_same_run(run(compiled("snapkv", **options), inputs, 3), expected)


def test_key_norms() -> None:
    inputs = make_inputs(((5, 9),))
    with torch.no_grad():
        cache = make_model(SHAPE)(**inputs, use_cache=True).past_key_values
    model = compiled("knorm", budgeting="uniform")
    with torch.no_grad():
        (kept,) = kept_of(model(**inputs, use_cache=True).past_key_values)
    length = inputs["input_ids"].shape[1]
    forced = {0, 1, 2, 3, length - 1}
    for layer, held in enumerate(kept):
        norms = cache.layers[layer].keys[0].norm(dim=-1).mean(0)
        best = [position for position in norms.argsort().tolist() if position not in forced]
        assert set(held) == forced | set(best[: len(held) - len(forced)])


def test_every_ranking_keeps_something_else() -> None:
    inputs = make_inputs(((60, 60),))  # so that the budget is more than SnapKV's window
    found = set()
    for name in RANKINGS:
        with torch.no_grad():
            found.add(str(kept_of(compiled(name)(**inputs, use_cache=True).past_key_values)))
    assert len(found) == len(RANKINGS)


def test_beams_and_inductor() -> None:
    inputs = make_inputs(((5, 9),))
    wanted = compiled("h2o").generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    found = compiled("h2o", lowering="inductor").generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(found, wanted)


def test_a_later_turn_ranks_again() -> None:
    inputs, question = make_inputs(((5, 9),)), make_inputs(((2, 6),))
    config = EvictionConfig(0.4, ranking="snapkv")
    first = reference(make_model(SHAPE), inputs, 2, config=config, image_token=IMAGE)
    expected = reference_turn(first, question, 2)
    model = compiled("snapkv")
    trace = run(model, inputs, 2)
    assert_same_run(second_turn(model, trace.cache, trace.mask, question, 2), expected)


def page_code() -> str:
    """The complete example of the page."""
    (code,) = re.findall(r"```python\n(import torch.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return code


def test_the_example_of_the_page() -> None:
    model = make_model(SHAPE)
    scope: dict[str, Any] = {"model": model, "__name__": "example"}
    exec(compile(page_code(), str(PAGE), "exec"), scope)
    found = run(model, make_inputs(PADDED), 3)
    length = make_inputs(PADDED)["input_ids"].shape[1]
    assert all(len(layer) < length for layer in found.kept[0][0])
    assert "asked" in str(explain(make_model(SHAPE), make_inputs(PADDED), 0.2, ranking=scope["asked"])).splitlines()[0]


def test_every_policy_stands_on_the_page() -> None:
    named = set(re.findall(r"^\| `\"(\w+)\"`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {*RANKINGS, *SHARINGS} == {*get_args(RankingName), *get_args(Budgeting)}


def test_budgeting_by_the_function_of_the_page() -> None:
    (code,) = re.findall(r"```python\n(def top_heavy.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {"torch": torch, "tgvkv_backend": tgvkv_backend, "__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), scope)
    model, inputs = compiled("twr", budget=0.5, budgeting=scope["top_heavy"]), make_inputs(PADDED)
    expected = reference(
        make_model(SHAPE), inputs, 3, config=EvictionConfig(0.5, budgeting=scope["top_heavy"]), image_token=IMAGE
    )
    assert_same_run(run(model, inputs, 3), expected)
    first, *_, last = (len(layer) for layer in expected.kept[0][0])
    assert first < last


def test_pyramid_budgets() -> None:
    inputs = make_inputs(PADDED)
    config = EvictionConfig(0.4, ranking="snapkv", budgeting="pyramid")
    expected = reference(make_model(SHAPE), inputs, 3, config=config, image_token=IMAGE)
    assert_same_run(run(compiled("snapkv", budgeting="pyramid"), inputs, 3), expected)
    first, *_, last = (len(layer) for layer in expected.kept[0][0])
    assert first > last


def sums_up(weights: torch.Tensor) -> torch.Tensor:
    return weights.sum(1)


def reads_weights(weights: torch.Tensor) -> torch.Tensor:
    return weights * float(weights[0, 0])


@pytest.mark.parametrize(
    ("budgeting", "said"),
    [(sums_up, r"returned torch.float32 \(.*must be torch.float32 \[B, L\]"), (reads_weights, r"cannot be traced")],
    ids=["shape", "number"],
)
def test_a_budgeting_that_breaks_a_rule_is_named(budgeting: Any, said: str) -> None:
    model = compiled("twr", budgeting=budgeting)
    with pytest.raises(ConfigError, match=rf"budgeting={budgeting.__name__} {said}"):
        run(model, make_inputs(((5, 9),)), 1)


def test_a_function_is_the_name_that_it_has() -> None:
    inputs = make_inputs(PADDED)
    wanted = run(compiled("snapkv"), inputs, 3)
    found = run(compiled(RANKINGS["snapkv"]), inputs, 3)
    assert found.kept == wanted.kept
    assert run(compiled(uniform(seed=0)), inputs, 3).kept == run(compiled("random"), inputs, 3).kept


def test_two_functions_of_one_name() -> None:
    def first(layer: Layer) -> Ranked:
        return Ranked((layer.tokens.positions + 1).float())

    newest = first

    def first(layer: Layer) -> Ranked:  # type: ignore[no-redef]
        return Ranked(1.0 / (layer.tokens.positions + 2).float())

    inputs = make_inputs(((5, 9),))
    late, early = (run(compiled(one), inputs, 1).kept[0][0][0] for one in (newest, first))
    assert late[5:-1] != early[5:-1] and sum(late) > sum(early)


def returns_positions(layer: Layer) -> Ranked:
    return Ranked((layer.tokens.positions + 1).float())


def returns_a_tensor(layer: Layer) -> Any:
    return layer.key.sum((1, 3))


def returns_half(layer: Layer) -> Ranked:
    return Ranked(layer.tokens.positions.half())


def returns_rows_of_heads(layer: Layer) -> Ranked:
    return Ranked(layer.key.float().sum(3))


def returns_float_tiers(layer: Layer) -> Ranked:
    return Ranked(layer.tokens.positions.float(), tier=layer.tokens.vision.float())


def reads_a_number(layer: Layer) -> Ranked:
    return Ranked(layer.tokens.positions.float() * layer.tokens.lengths[0].item())


def branches(layer: Layer) -> Ranked:
    if layer.tokens.vision.any():
        return Ranked(layer.tokens.positions.float())
    return Ranked(-layer.tokens.positions.float())


def writes(layer: Layer) -> Ranked:
    layer.key.mul_(2.0)
    return Ranked(layer.tokens.positions.float())


def fails(layer: Layer) -> Ranked:
    raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        (returns_a_tensor, r"returned a Tensor; return Ranked"),
        (returns_half, r"returned score as torch.float16 .*must be torch.float32 \[B, S\]"),
        (returns_rows_of_heads, r"returned score as torch.float32 \(.*must be torch.float32 \[B, S\]"),
        (returns_float_tiers, r"returned tier as torch.float32 .*must be torch.int64 \[B, S\]"),
        (reads_a_number, r"cannot be traced.*without \.item\(\)"),
        (branches, r"cannot be traced.*`if` on a tensor"),
        (writes, r"writes to its Layer in place.*make new tensors"),
        (fails, r"cannot be traced \(KeyError: 'nothing here'\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_that_breaks_a_rule_is_named(ranking: Any, said: str) -> None:
    model = compiled(ranking)
    with pytest.raises(ConfigError, match=rf"(?s)ranking={ranking.__name__} {said}"):
        run(model, make_inputs(((5, 9),)), 1)


def test_the_cache_names_its_policies() -> None:
    model, inputs = compiled(returns_positions, budgeting="pyramid"), make_inputs(((5, 9),))
    report = inspect_cache(model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True))
    assert (report.ranking, report.budgeting) == ("returns_positions", "pyramid")
    uncompiled = make_model(SHAPE).generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert (inspect_cache(uncompiled).ranking, inspect_cache(uncompiled).budgeting) == (None, None)


@pytest.mark.parametrize("wrong", ["snapKV", None, 3])
def test_a_ranking_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"ranking=.* choose one of 'twr', 'snapkv', .*, or give a function"):
        tgvkv_backend(0.4, ranking=wrong)
