"""Shapes of models and prompts. Data only."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured. Weights are random, the vision tower is tiny; the decoder has the named model's shape.

    Attributes:
        kind: The transformers model that it is built as.
        layers: L.
        hidden: Size of a token's state.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        feed_forward: Width of the feed-forward layers.
        vocabulary: Rows of the embedding.
        dtype: Name of torch's.
        device: `"cpu"` or `"cuda"`.
        context: N: tokens of the prompt.
        picture_side: A picture becomes `picture_side ** 2` vision tokens. The prompt has as many pictures as fit beside
            `least_text` tokens of text; what is left is text.
        least_text: Fewest tokens of text.
        question: Tokens of text behind the last picture; the rest of the text stands before the first.
        batch: Of decode.
        prefill_batch: Of prefill.
        rounds: Timed rounds of decode.
        steps: Decode steps of a contender in a round.
        prefill_rounds: Timed rounds of prefill.
        tied: Whether the output layer is the embedding.
    """

    kind: Literal["llava", "qwen2_5_vl", "qwen3_vl"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    context: int
    picture_side: int
    least_text: int
    question: int
    batch: int
    prefill_batch: int
    rounds: int
    steps: int
    prefill_rounds: int
    tied: bool = False


# One decoder as small as its pictures: for tests, and to see whether everything runs.
_TINY = Preset(
    kind="llava", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=256,
    dtype="float32", device="cpu", context=160, picture_side=8, least_text=24, question=12,
    batch=2, prefill_batch=1, rounds=3, steps=2, prefill_rounds=2,
)  # fmt: skip

# A picture of LLaVA-NeXT: five tiles of 24 x 24 patches, and 48 tokens of text.
_LLAVA_NEXT_CPU = Preset(
    kind="llava", layers=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=2816, vocabulary=32_000,
    dtype="float32", device="cpu", context=2928, picture_side=24, least_text=48, question=32,
    batch=4, prefill_batch=1, rounds=10, steps=4, prefill_rounds=5,
)  # fmt: skip

# A decoder small enough that the time of compiling it is what a user waits for. `bench.answers` asks it about pictures of
# sizes of its own.
_QWEN2_5_VL_CPU = Preset(
    kind="qwen2_5_vl", layers=8, hidden=512, heads=8, kv_heads=2, head_dim=64, feed_forward=1408, vocabulary=32_000,
    dtype="float32", device="cpu", context=1072, picture_side=16, least_text=48, question=32,
    batch=4, prefill_batch=1, rounds=10, steps=4, prefill_rounds=5,
)  # fmt: skip

_LLAVA_1_5_7B = Preset(
    kind="llava", layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, feed_forward=11_008, vocabulary=32_064,
    dtype="bfloat16", device="cuda", context=4096, picture_side=24, least_text=48, question=32,
    batch=1, prefill_batch=1, rounds=10, steps=4, prefill_rounds=7,
)  # fmt: skip

_QWEN2_5_VL_7B = dataclasses.replace(
    _LLAVA_1_5_7B,
    kind="qwen2_5_vl", layers=28, hidden=3584, heads=28, kv_heads=4, feed_forward=18_944, vocabulary=152_064,
)  # fmt: skip

_QWEN3_VL_8B = dataclasses.replace(
    _LLAVA_1_5_7B,
    kind="qwen3_vl", layers=36, kv_heads=8, feed_forward=12_288, vocabulary=151_936,
)  # fmt: skip

_GPU = {"llava-1.5-7b": _LLAVA_1_5_7B, "qwen2.5-vl-7b": _QWEN2_5_VL_7B, "qwen3-vl-8b": _QWEN3_VL_8B}
_CONTEXTS = {"1k": 1024, "4k": 4096, "8k": 8192, "16k": 16_384}

PRESETS: dict[str, Preset] = {
    "tiny": _TINY,
    "llava-next-cpu": _LLAVA_NEXT_CPU,
    "qwen2.5-vl-cpu": _QWEN2_5_VL_CPU,
    **_GPU,
    **{
        f"{name}-{short}": dataclasses.replace(preset, context=context)
        for name, preset in _GPU.items()
        for short, context in _CONTEXTS.items()
    },
}
