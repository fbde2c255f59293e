from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from tests.passes.decoder import Decoder, Layer, capture, features, full_cache, pasts, tokens
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import UnsupportedGraphError
from tgvkv_compile.passes.find.find_enclosed import find_enclosed
from tgvkv_compile.pipeline import plan_of


class Checkpointed(Layer):
    """Its whole body is run again in the backward pass."""

    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False)


class Twice(Checkpointed):
    """A checkpointed layer in a checkpointed layer."""

    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False)


class Uncached(Decoder):
    """Returns no cache."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0]


def graph(model: Decoder, *call: Any) -> GraphModule:
    return capture(model, *call)[0]


@pytest.mark.parametrize("kind", [Checkpointed, Twice])
def test_appends_in_bodies(kind: type[Layer]) -> None:
    gm = graph(Decoder(kind=kind), tokens(), features())
    misses = find_enclosed(gm)
    assert len(misses) == 4  # keys and values of two layers
    assert all(miss.target == "cat" and "decoder.py:" in miss.source for miss in misses)
    assert "in the body of %tag_activation_checkpoint" in misses[0].reason and "use_cache=False" in misses[0].reason


def test_a_past_makes_no_difference() -> None:
    gm = graph(Decoder(kind=Checkpointed), tokens()[:, :1], None, full_cache(7))
    assert len(find_enclosed(gm)) == 4
    for compressed in (pasts(gm), frozenset[str]()):
        plan = plan_of(gm, compressed)
        assert plan.kind == "dense" and len(plan.misses) == 4


def test_what_is_none() -> None:
    assert find_enclosed(graph(Decoder(), tokens(), features())) == ()
    gm = graph(Uncached(kind=Checkpointed), tokens(), features())
    assert "tag_activation_checkpoint" in gm.code and find_enclosed(gm) == ()


def test_it_is_refused_whatever_the_prompt() -> None:
    for call in ((tokens(), features()), (tokens()[:, :6],)):
        torch._dynamo.reset()
        model = Decoder(kind=Checkpointed)
        model.compile(backend=tgvkv_backend(0.4, lowering="eager"))
        with pytest.raises(UnsupportedGraphError, match=r"(?s)4 sites cannot be rewritten.*gradient_checkpointing_disable\(\)"):
            model(*call)


def test_without_a_cache_it_runs_dense() -> None:
    stock = Uncached(kind=Checkpointed)
    model, backend = Uncached(kind=Checkpointed), tgvkv_backend(0.4, lowering="eager")
    model.compile(backend=backend)
    torch.testing.assert_close(model(tokens(), features()), stock(tokens(), features()))
    assert backend.graphs == {"dense": 1}
