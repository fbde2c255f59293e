"""Caches of compiled graphs: another process, here another cache of dynamo, finds every piece that one has lowered."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.lower import lowered

pytestmark = pytest.mark.slow
PIECES = 8


@dataclasses.dataclass(frozen=True)
class Answered:
    """What AOTAutograd's cache counted while a model was compiled anew, and the answer."""

    counted: dict[str, int]
    answer: Any


def answered() -> Answered:
    torch._dynamo.reset()
    counters.clear()
    model = make_model(Shape(layers=3))
    model.compile(backend=tgvkv_backend(0.3))
    trace = run(model, make_inputs(((5, 9), (3, 12))), 3)
    counted = {name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items()}
    return Answered(
        {name: counted.get(name, 0) for name in ("hit", "miss", "bypass")}, [trace.kept, trace.continuation.tolist()]
    )


@pytest.fixture(scope="module")
def cold() -> Iterator[tuple[Answered, bytes]]:
    """The first answer with an empty folder, which stays there, and the artifacts of it."""
    with fresh_cache():
        first = answered()
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        yield first, artifacts[0]


def test_every_piece_is_found_again(cold: tuple[Answered, bytes]) -> None:
    assert cold[0].counted == {"hit": 0, "miss": PIECES, "bypass": 0}
    warm = answered()
    assert warm.counted == {"hit": PIECES, "miss": 0, "bypass": 0}
    assert warm.answer == cold[0].answer


def test_artifacts_carry_the_pieces(cold: tuple[Answered, bytes], tmp_path: Path) -> None:
    (tmp_path / "compiled.bin").write_bytes(cold[1])
    with fresh_cache():
        torch.compiler.load_cache_artifacts((tmp_path / "compiled.bin").read_bytes())
        warm = answered()
    assert warm.counted == {"hit": PIECES, "miss": 0, "bypass": 0}
    assert warm.answer == cold[0].answer


def test_functions_of_this_package_go_by_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph names them only; the key of the caches has a digest of what they do."""
    marked: list[dict[str, str]] = []

    def noted(gm: GraphModule, *_: Any, **__: Any) -> Any:
        marked.append(lowered._cacheable(gm).get("unsafe_marked_cacheable_functions", {}))
        return gm.forward

    monkeypatch.setitem(lowered._BACKENDS, "inductor", noted)
    answered()
    names = {name for piece in marked for name in piece}
    assert {"tgvkv_compile.ops.cache.decode_step.decode_step", "tgvkv_compile.ops.cache.packing.evict_into"} <= names
    assert {digest for piece in marked for digest in piece.values()} == {lowered._sources()}
