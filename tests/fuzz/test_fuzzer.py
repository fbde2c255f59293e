"""That the fuzzer runs, draws the same case from the same seed, and finds what is wrong."""

from collections.abc import Iterator

import pytest
import torch

from tests.fuzz.__main__ import case_of
from tests.fuzz.cases import Case, Copy, Crop, Decode, Request, Select, Style, Turn
from tests.fuzz.check import Finding, Tally, run_case
from tests.support.models import Shape
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops import decode_step

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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    with pytest.raises(Finding, match=r"request 0, .*action 0 \(Decode\(steps=2\)\), step \d: .*sample \d"):
        run_case(CASE, Tally())
