"""That the fuzzer runs, draws the same case from the same seed, and finds what is wrong."""

import pytest
import torch

from tests.fuzz import __main__ as fuzzer
from tests.fuzz.__main__ import case_of, fuzz_seed
from tests.fuzz.cases import Case, Copy, Crop, Decode, Request, Select, Style, Turn
from tests.fuzz.check import Finding, Tally, run_case
from tests.fuzz.families import Tiny
from tests.support.models import Shape
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.cache import decode_step
from tgvkv_compile.ops.kernels.cpu import decode as cpu_decode

EVERYTHING = Request(
    prompts=((3, 5), (2, 0, 4), (9,)),
    seed=1,
    weights=2,
    actions=(
        Decode(2),
        Copy((Select((2, 0, 0), "reorder"), Decode(2), Turn(3, (0, 1)), Decode(1))),
        Crop(4),
        Turn(3),
        Decode(2),
    ),
)
CASE = Case("llava", Shape(layers=2, heads=2, kv_heads=1), EvictionConfig(0.3), 1, Style(images=2), (EVERYTHING,))


def test_a_seed_is_a_case() -> None:
    cases = [case_of(seed, 5) for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2]
    assert all(len(case.requests) <= 5 for case in cases)


def test_every_action_is_compared() -> None:
    tally = Tally()
    run_case(CASE, tally)
    assert (tally.cases, tally.models) == (1, 1)
    assert tally.calls == 1 + 2 + 4 + 1 + 2 and tally.undecided < tally.samples / 2
    assert tally.patterns == {"decode": 4, "copy": 1, "select": 1, "turn": 2, "crop": 1}


def test_a_wrong_eviction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = decode_step.choose_eviction

    def largest(attention: torch.Tensor, *rest: torch.Tensor, **options: EvictionConfig) -> torch.Tensor:
        return choose(-attention, *rest, **options)

    monkeypatch.setattr(decode_step, "choose_eviction", largest)
    monkeypatch.setattr(cpu_decode, "kernel_for", lambda *_: None)  # which chooses by itself
    with pytest.raises(Finding, match=r"request 0, .*action 0 \(Decode\(steps=2\)\), step \d: .*sample \d"):
        run_case(CASE, Tally())


def test_a_family_of_its_own_is_compared() -> None:
    """Three rows of positions, and a vision tower that the model's own call runs."""
    tally = Tally()
    run_case(Case("qwen2_5_vl", Tiny("qwen2_5_vl"), EvictionConfig(0.3), 1, Style(images=3), (EVERYTHING,)), tally)
    assert tally.calls == 10 and tally.undecided < tally.samples / 2


FOUND = [
    # crop takes the only entry of a short sample back: its segments had no slot for the token after the next one
    Case(
        "llava",
        Shape(layers=2),
        EvictionConfig(0.44, budgeting="uniform", decode="fixed", sink_tokens=0),
        3,
        Style(images=1, give_mask=False),
        (Request(prompts=((5, 0), (2,)), seed=892, weights=205, actions=(Crop(28), Decode(3))),),
    ),
    # the model says a placeholder itself, which the reference took for a picture
    Case(
        "llava_onevision",
        Tiny("llava_onevision", attention="eager"),
        EvictionConfig(25, budgeting="waterfill", decode="fixed", sink_tokens=7),
        3,
        Style(batch=4, images=3, generate=True),
        (Request(prompts=((4,), (1,), (2,)), seed=7142, weights=7691),),
    ),
]


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_once(case: Case) -> None:
    run_case(case, Tally())


def test_a_finding_is_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a case is what shows the fault: here, a turn of at least three tokens."""

    def fails(case: Case, tally: Tally, *, lowering: str) -> None:
        if any(isinstance(action, Turn) and action.tokens >= 3 for request in case.requests for action in request.actions):
            raise Finding("planted")

    monkeypatch.setattr(fuzzer, "run_case", fails)
    found = fuzz_seed(1, 4, Tally(), shrink=True, lowering="eager")
    assert found is not None
    text, case = found
    assert text == "planted"
    (request,) = case.requests
    assert request.actions == (Turn(3),)
