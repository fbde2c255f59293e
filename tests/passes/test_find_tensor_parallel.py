from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.passes.decoder import (
    DIM,
    Decoder,
    Layer,
    calls,
    capture,
    features,
    flag,
    full_cache,
    masked,
    pasts,
    rewritten,
    tokens,
)
from tgvkv_compile.backend.programs import address_of
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.pipeline import find_all, plan_of
from tgvkv_compile.plan import Miss, TensorParallel

NONE: frozenset[str] = frozenset()
WORLD = "0"
"""Name of the group of all ranks."""
OTHER = "1"


@pytest.fixture(autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which only this one exists: its collectives hand back what they are given."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def all_reduce(tensor: Tensor, operation: str = "sum", group: str = WORLD) -> Tensor:
    """As dynamo writes it."""
    summed: Tensor = torch.ops._c10d_functional.all_reduce(tensor, operation, group)
    return torch.ops._c10d_functional.wait_tensor(summed)  # type: ignore[no-any-return]


class Row(Layer):
    """A row-parallel output projection, as transformers writes it: a local product, then an all-reduce."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.o = nn.Linear(self.heads * DIM, self.heads * DIM, bias=False)

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden.shape
        q, k, v = (project(hidden).view(batch, length, -1, DIM).transpose(1, 2) for project in (self.q, self.k, self.v))
        keys, values = self.store(past, k, v)
        out = self.attend(q, keys, values, mask, self).transpose(1, 2).reshape(batch, length, -1).contiguous()
        return hidden + self.reduced(self.o(self.gated(out))), keys, values

    def gated(self, out: Tensor) -> Tensor:
        return out

    def reduced(self, projected: Tensor) -> Tensor:
        return all_reduce(projected)


class InPlace(Row):
    """`dist.all_reduce` as dynamo rewrites it."""

    def reduced(self, projected: Tensor) -> Tensor:
        projected.copy_(all_reduce(projected))
        return projected


class Gated(Row):
    """Attention's output times a gate."""

    def gated(self, out: Tensor) -> Tensor:
        return out * torch.sigmoid(self.q(out))


class Whole(Row):
    """Attention is whole on every rank; the MLP after it is split."""

    def reduced(self, projected: Tensor) -> Tensor:
        return all_reduce(self.o(torch.relu(projected + 1.0)))


class Elsewhere(Row):
    def reduced(self, projected: Tensor) -> Tensor:
        return all_reduce(projected, group=OTHER)


class Averaged(Row):
    def reduced(self, projected: Tensor) -> Tensor:
        return all_reduce(projected, "avg")


class Gathered(Row):
    """Another collective in that place."""

    def reduced(self, projected: Tensor) -> Tensor:
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(projected, 2, WORLD)
        return torch.ops._c10d_functional.wait_tensor(gathered)[: projected.shape[0]]  # type: ignore[no-any-return]


def found(*kind: Any, attend: Any = flag, mask: Tensor | None = None) -> tuple[TensorParallel | None, tuple[Miss, ...]]:
    gm, _ = capture(Decoder(attend, kind=kind), tokens(), features(), None, mask)
    result = find_all(gm)
    plan = plan_of(gm, NONE)
    assert plan.tensor_parallel == (None if result.misses else result.tensor_parallel) and plan.misses == result.misses
    return result.tensor_parallel, result.misses


@pytest.mark.parametrize("kind", [Row, InPlace, Gated])
def test_the_group_of_a_row_parallel_projection(kind: type[Layer]) -> None:
    assert found(kind, kind) == (TensorParallel(WORLD), ())


@pytest.mark.parametrize("kind", [Layer, Whole])
def test_whole_attention_needs_nothing(kind: type[Layer]) -> None:
    assert found(kind, kind) == (None, ())


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ((Row, Layer), "split over process group None here and '0' in the first layer"),
        ((Row, Elsewhere), "split over process group '1' here and '0' in the first layer"),
        ((Averaged,), r"an all_reduce\('sum'\) over a named group was expected"),
        ((Gathered,), r"an all_reduce\('sum'\) over a named group was expected"),
    ],
)
def test_other_ways_of_splitting_are_misses(kinds: tuple[type[Layer], ...], reason: str) -> None:
    assert dist.new_group([0, 1]).group_name == OTHER
    group, misses = found(*kinds)
    assert group is None and len(misses) == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(misses[0].reason)


def test_a_mask_per_head_is_a_miss() -> None:
    mask = torch.ones(19, 19, dtype=torch.bool).tril().expand(1, 4, 19, 19)
    _, misses = found(Row, attend=masked, mask=mask.contiguous())
    assert "a mask per head on heads that are split over ranks" in misses[0].reason
    assert found(Row, attend=masked, mask=mask[:, :1].contiguous()) == (TensorParallel(WORLD), ())


def test_a_partial_dtensor_tells_its_group(mesh: DeviceMesh) -> None:
    class Distributed(Row):
        def reduced(self, projected: Tensor) -> Tensor:
            partial = DTensor.from_local(projected, mesh, [Partial()], run_check=False)
            return partial.redistribute(placements=[Replicate()]).to_local()

    assert found(Distributed, Distributed) == (TensorParallel(WORLD), ())


class _Unknown(Row):
    def reduced(self, projected: Tensor) -> Tensor:
        return torch.cumsum(projected, -1)  # something that no finder knows


def test_a_sharded_query_weight_without_a_sum_is_a_miss(mesh: DeviceMesh) -> None:
    class Column(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight.to_local())  # type: ignore[attr-defined]

    model = Decoder(kind=(_Unknown,))
    column = Column(4 * DIM, 4 * DIM, bias=False)
    column.weight = nn.Parameter(DTensor.from_local(column.weight.detach(), mesh, [Shard(0)], run_check=False))
    model.layers[0].q = column
    gm, _ = capture(model, tokens(), features())
    (miss,) = find_all(gm).misses
    assert "the query heads are split over ranks (%" in miss.reason and "but no all-reduce was found" in miss.reason


def test_a_shard_is_known_by_its_own_address(mesh: DeviceMesh) -> None:
    local = torch.ones(3)
    assert address_of(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)) == address_of(local) == local.data_ptr()


def test_what_is_inserted() -> None:
    gm, inputs = capture(Decoder(kind=(Row, Row)), tokens(), features())
    graph = rewritten(gm, inputs).gm.graph
    scored = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "rank_tokens"]
    assert len(scored) == 2 and all(node.kwargs["group"] for node in scored)
    gm, inputs = capture(Decoder(kind=(Row, Row)), tokens()[:, :1], None, full_cache(7))
    result = rewritten(gm, inputs, compressed=pasts(gm), config=EvictionConfig(0.4))
    called = calls(result.gm)
    assert called.count("tensor_parallel_decode_step") == 2 and "decode_step" not in called
    steps = [node for node in result.gm.graph.nodes if node.name.startswith("tgvkv_out")]
    assert_expected_inline(
        "\n".join(f"{node.name} {node.kwargs}" for node in steps),
        """\
tgvkv_out_0 {'layer': 0, 'scale': 0.5, 'decode': 'ratio', 'sink_tokens': 4, 'group': '0'}
tgvkv_out_1 {'layer': 1, 'scale': 0.5, 'decode': 'ratio', 'sink_tokens': 4, 'group': '0'}""",
    )
