import pytest
from expecttest import assert_expected_inline

from tests.passes.decoder import Decoder, calls, capture, causal, features, masked, render, rewritten, tokens
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.passes.extract_vision_count import extract_vision_count

CONFIG = EvictionConfig(0.3, budget_of="vision")


@pytest.mark.parametrize("left", [0, 3])
def test_counts_the_vision_tokens_of_each_sample(left: int) -> None:
    gm, inputs = capture(Decoder(masked), tokens(2), features(2), None, causal(2, 19, left=left))
    counter = rewritten(gm, inputs, config=CONFIG).vision_count
    assert counter is not None
    (count,) = counter(*inputs)
    # Six tokens stand before the image, three of them padding: of the four sinks, the image's first then is one.
    assert count.tolist() == [8 if left == 0 else 7, 8]


def test_only_the_mask_is_left() -> None:
    gm, inputs = capture(Decoder(masked), tokens(), features(), None, causal(1, 19))
    result = rewritten(gm, inputs, "extract_vision_count", config=CONFIG)
    assert result.vision_count is not None
    called = calls(result.vision_count)
    assert called[-1] == "count_vision" and not {"linear", "embedding", "scaled_dot_product_attention"} & set(called)
    assert "count_vision" not in calls(result.gm)  # the graph itself is as it was
    assert calls(result.gm) == calls(gm)


def test_only_a_budget_of_vision_needs_it() -> None:
    gm, inputs = capture(Decoder(), tokens(), features())
    assert rewritten(gm, inputs).vision_count is None


def test_golden() -> None:
    gm, inputs = capture(Decoder(), tokens(), features())
    result = rewritten(gm, inputs, "extract_vision_count", config=CONFIG)
    with result.environment.tracing():
        counter = extract_vision_count(result.gm, result.plan, CONFIG)
    assert_expected_inline(
        render(counter),
        """\
%tgvkv_vision : bool[1, 19] = vision_positions((%unsqueeze))
%tgvkv_roles : Roles = token_roles(%tgvkv_vision, None)
%tgvkv_count : i64[1] = count_vision(%tgvkv_roles, budget=0.3, budget_of='vision', budgeting='tvb', decode='ratio', sink_tokens=4)""",
    )
