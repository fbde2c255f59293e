"""PyramidKV (Cai et al., COLM 2025, arXiv 2406.02069, section 4.2.1)."""

import torch
from torch import Tensor

from tgvkv_compile.ops.policy.bounds import Bounds, fill

BETA = 20.0


def pyramid(weight: Tensor, bounds: Bounds) -> Tensor:
    """Budgets fall in a straight line from the first layer to the last.

    The last layer has `share / beta`, the first `2 share - share / beta`, `beta` 20 as in the released code. Adapted: what a
    layer cannot hold goes to the others, so that the total is met.

    Returns:
        `[B, L]`; the ranking's weights count for nothing.
    """
    layers = weight.shape[1]
    depth = torch.arange(layers, dtype=torch.float32, device=weight.device) / max(1, layers - 1)
    top = 2.0 - 1.0 / BETA
    return fill((top - depth * (top - 1.0 / BETA)).expand_as(weight), bounds)
