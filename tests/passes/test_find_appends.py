import pytest
import torch
from torch import Tensor, nn

from tests.passes.decoder import (
    Decoder,
    Layer,
    SlidingLayer,
    StaticLayer,
    capture,
    causal,
    features,
    full_cache,
    masked,
    tokens,
)
from tgvkv_compile.fx.meta import output_nodes
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.passes.find.find_appends import find_appends


@pytest.mark.parametrize("layers", [1, 3])
def test_a_first_call_appends_to_nothing(layers: int) -> None:
    gm, _ = capture(Decoder(layers=layers), tokens(), features())
    found, misses = find_appends(gm)
    assert misses == () and len(found) == 2 * layers
    for append in found:
        assert append.past is None
        assert op_kind(append.node) == "cat" and output_nodes(gm)[append.output] is append.node
        assert append.node.args[0][1] is append.new


def test_a_later_call_appends_to_inputs() -> None:
    gm, _ = capture(Decoder(), tokens()[:, :1], None, full_cache(7))
    found, misses = find_appends(gm)
    assert misses == ()
    assert [append.past.name for append in found] == [
        "l_past_0_0_", "l_past_0_1_", "l_past_1_0_", "l_past_1_1_",
    ]  # fmt: skip
    assert len({append.output for append in found}) == 4


def test_sliding_layers_are_left_alone() -> None:
    gm, _ = capture(Decoder(kind=(SlidingLayer, Layer)), tokens(), features())
    assert calls_cat(gm) == 4
    found, misses = find_appends(gm)
    assert misses == () and len(found) == 2
    kept = {node.name for node in output_nodes(gm)}
    assert all(append.node.name in kept for append in found)


def test_a_static_cache_is_a_miss_with_its_source_line() -> None:
    gm, _ = capture(Decoder(masked, kind=StaticLayer), tokens(), features(), full_cache(19), causal(1, 19))
    found, misses = find_appends(gm)
    assert found == () and len(misses) == 4
    for miss in misses:
        assert "StaticCache" in miss.reason and "cache_implementation='dynamic'" in miss.reason
        assert miss.target == "index_copy_" and "decoder.py:" in miss.source and "index_copy_(2, where" in miss.source


class _Cats(nn.Module):
    """Joins that are none of ours: other dimensions, three parts, order, not returned, both parts computed."""

    def forward(self, past: Tensor, new: Tensor) -> list[Tensor]:
        hidden = torch.cat([past, new], dim=-2).relu()
        return [
            torch.cat([past, new], dim=1),
            torch.cat([past, new, new], dim=-2),
            torch.cat([new * 2, past], dim=-2),
            torch.cat([past[0], new[0]], dim=-2),
            hidden,
        ]


def test_other_joins_are_not_appends() -> None:
    gm, _ = capture(_Cats(), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert calls_cat(gm) == 5
    assert find_appends(gm) == ((), ())


def test_nothing_is_changed() -> None:
    gm, _ = capture(Decoder(), tokens(), features())
    before = gm.print_readable(print_output=False)
    assert find_appends(gm) == find_appends(gm)
    assert gm.print_readable(print_output=False) == before


def calls_cat(gm: torch.fx.GraphModule) -> int:
    return sum(op_kind(node) == "cat" for node in gm.graph.nodes)
