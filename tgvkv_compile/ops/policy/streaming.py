"""StreamingLLM: attention sinks and a window (Xiao et al., ICLR 2024, arXiv 2309.17453, section 3.2)."""

import torch

from tgvkv_compile.ops.policy.layer import Layer, Ranked


def streaming(layer: Layer) -> Ranked:
    """The most recent tokens, beside the sinks, which stay whatever ranks: `score = position + 1`.

    Positions stay those of the prompt; the paper counts them anew inside of the cache.

    Returns:
        `score [B, S]`, exact below `2 ** 24` tokens.
    """
    return Ranked((layer.tokens.positions + 1).to(torch.float32))
