"""H2O: heavy hitters (Zhang et al., NeurIPS 2023, arXiv 2306.14048, section 4)."""

import torch

from tgvkv_compile.ops.policy.layer import Layer, Ranked


def h2o(layer: Layer) -> Ranked:
    """The tokens that have received most attention, and the most recent ones, half of the budget each.

    `score[s] = sum_i A[i, s]` over all rows. Adapted: `A` is averaged over heads, because all heads of a layer keep the same
    entries here, and the recent half is that of the mean budget.

    Returns:
        `score [B, S]`; `tier`: 1 at recent tokens.
    """
    recent = layer.newest((layer.share * 0.5).to(torch.int64))
    (received,) = layer.weigh((layer.rows(layer.tokens.valid), None))
    return Ranked(received.sums, tier=recent.to(torch.int64))
