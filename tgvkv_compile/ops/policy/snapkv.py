"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469, section 4.2)."""

import torch

from tgvkv_compile.ops.policy.layer import Layer, Ranked

WINDOW = 32
KERNEL = 5


def snapkv(layer: Layer) -> Ranked:
    """What the prompt's last rows look at, smoothed over neighbours, and these rows themselves.

    `score = avg_pool1d(sum_{i in window} A[i, :])` over the columns before the observation window, window 32, kernel 5 (stride
    1, zeros behind both ends, as in the released code); the window always stays. Adapted: `A` is averaged over heads,
    because all heads of a layer keep the same entries here.

    Returns:
        `score [B, S]`; `tier`: 1 in the window.
    """
    window = layer.newest(WINDOW)
    before = layer.tokens.valid & ~window
    (observed,) = layer.weigh((layer.rows(window), before))
    votes = torch.where(before, observed.sums, 0.0)
    pooled = torch.nn.functional.avg_pool1d(votes.unsqueeze(1), KERNEL, stride=1, padding=KERNEL // 2).squeeze(1)
    return Ranked(torch.where(before, pooled, 0.0), tier=window.to(torch.int64))
