"""Caches of compiled graphs: another process, here another cache of dynamo, finds every piece that one has lowered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.lower import lowered

pytestmark = pytest.mark.slow
SHAPE = Shape(layers=4)


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    with fresh_cache():
        yield


def answered() -> tuple[dict[str, int], list[Any]]:
    """What AOTAutograd's cache counted while a model was compiled anew, and the answer."""
    torch._dynamo.reset()
    counters.clear()
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(0.3))
    trace = run(model, make_inputs(((5, 9), (3, 12))), 3)
    counted = {name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items()}
    return {name: counted.get(name, 0) for name in ("hit", "miss", "bypass")}, [trace.kept, trace.continuation.tolist()]


def test_every_piece_is_found_again() -> None:
    cold, wanted = answered()
    assert cold == {"hit": 0, "miss": 8, "bypass": 0}
    warm, found = answered()
    assert warm == {"hit": 8, "miss": 0, "bypass": 0}
    assert found == wanted


def test_other_sources_of_this_package_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    answered()
    monkeypatch.setattr(lowered, "_sources", lambda: "of another release")
    counted, _ = answered()
    assert counted["miss"] >= 5  # all pieces that hold a function of this package


def test_artifacts_carry_the_pieces(tmp_path: Path) -> None:
    _, wanted = answered()
    artifacts = torch.compiler.save_cache_artifacts()
    assert artifacts is not None
    (tmp_path / "compiled.bin").write_bytes(artifacts[0])
    with fresh_cache():
        torch.compiler.load_cache_artifacts((tmp_path / "compiled.bin").read_bytes())
        counted, found = answered()
    assert counted == {"hit": 8, "miss": 0, "bypass": 0}
    assert found == wanted
