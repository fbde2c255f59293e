from typing import Any

import pytest
from expecttest import assert_expected_inline

from tests.passes.decoder import Decoder, calls, capture, causal, features, masked, render, tokens
from tests.passes.test_materialise_masks import flexed
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.pipeline import vision_counter

CONFIG = EvictionConfig(0.3, budget_of="vision")


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("attend", [masked, flexed])
def test_counts_the_vision_tokens_of_each_sample(attend: Any, left: int) -> None:
    gm, inputs = capture(Decoder(attend), tokens(2), features(2), None, causal(2, 19, left=left))
    (count,) = vision_counter(gm, inputs, CONFIG)(*inputs)
    # Six tokens stand before the image, three of them padding: of the four sinks, the image's first then is one.
    assert count.tolist() == [8 if left == 0 else 7, 8]


def test_only_the_mask_is_left() -> None:
    gm, inputs = capture(Decoder(masked), tokens(), features(), None, causal(1, 19))
    before = calls(gm)
    called = calls(vision_counter(gm, inputs, CONFIG))
    assert called[-1] == "count_vision" and not {"linear", "embedding", "scaled_dot_product_attention"} & set(called)
    assert calls(gm) == before  # the graph itself is as it was


def test_golden() -> None:
    gm, inputs = capture(Decoder(), tokens(), features())
    assert_expected_inline(
        render(vision_counter(gm, inputs, CONFIG)),
        """\
%tgvkv_vision : bool[1, 19] = vision_positions((%unsqueeze))
%tgvkv_types : TokenTypes = classify_tokens(%tgvkv_vision, None)
%tgvkv_count : i64[1] = count_vision(%tgvkv_types, budget=0.3, budget_of='vision', budgeting='tvb', decode='ratio', sink_tokens=4)""",
    )
