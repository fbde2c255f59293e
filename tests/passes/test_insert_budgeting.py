import pytest
import torch
from expecttest import assert_expected_inline

from tests.passes.decoder import Decoder, calls, capture, features, render, rewritten, tokens, values
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import allocate
from tgvkv_compile.ops.token_types import vision_count


@pytest.mark.parametrize("config", [
    EvictionConfig(0.4),
    EvictionConfig(0.4, budgeting="waterfill"),
    EvictionConfig(9, budgeting="uniform", decode="fixed"),
    EvictionConfig(0.25, budget_of="vision", sink_tokens=1),
])  # fmt: skip
def test_the_allocation_is_that_of_the_masses(config: EvictionConfig) -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(2), features(2))
    result = rewritten(gm, inputs, "insert_budgeting", config=config)
    got = values(result.gm, inputs)
    mass = torch.stack([got[f"tgvkv_mass_{layer}"] for layer in range(3)], dim=1)
    token_types = got["tgvkv_types"]
    expected = allocate(mass, token_types.lengths, vision_count(token_types, config=config), config=config)
    torch.testing.assert_close(got["tgvkv_budgets"].kept, expected.kept, rtol=0, atol=0)
    torch.testing.assert_close(got["tgvkv_budgets"].rate, expected.rate, rtol=0, atol=0)
    assert expected.kept.shape == (2, 3) and int(expected.kept.max()) < 19


def test_one_call_for_all_layers() -> None:
    gm, inputs = capture(Decoder(layers=3), tokens(), features())
    assert "allocate_layers" not in calls(rewritten(gm, inputs, "insert_scoring").gm)
    assert calls(rewritten(gm, inputs, "insert_budgeting").gm).count("allocate_layers") == 1


def test_golden() -> None:
    gm, inputs = capture(Decoder(), tokens(), features())
    assert_expected_inline(
        render(rewritten(gm, inputs, "insert_budgeting").gm, prefix="tgvkv_budgets"),
        """%tgvkv_budgets : Allocation = allocate_layers((%tgvkv_mass_0, %tgvkv_mass_1), %tgvkv_types, budget=0.4, budget_of='all', budgeting='tvb', decode='ratio', sink_tokens=4)""",
    )
