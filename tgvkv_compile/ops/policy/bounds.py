"""How a budget is shared out to layers: what a method is given, and filling layers by weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_FILL_STEPS = 64
# Weights below this share count as this share when layers are filled. It lets layers without any mass take what no
# other layer can hold, so that the total is always met, and bounds the search.
_FILL_MIN_WEIGHT = 2.0**-30


class Bounds(NamedTuple):
    """What is shared out: per layer `lower … upper` entries, `share` of them on average. All float32 `[B, 1]`."""

    share: Tensor
    lower: Tensor
    upper: Tensor


Sharing = Callable[[Tensor, Bounds], Tensor]
"""From the layers' weights float32 `[B, L]`, which sum to 1, to the entries that each layer wants, float32 `[B, L]`."""


def fill(weight: Tensor, bounds: Bounds) -> Tensor:
    """Wants `clamp(c * w_l, lower, upper) [B, L]` with `c` such that they sum to `L * share`, found by bisection."""
    weight = weight.clamp(min=_FILL_MIN_WEIGHT)
    target = bounds.share * weight.shape[1]
    low = torch.zeros_like(target)
    high = bounds.upper / weight.amin(1, keepdim=True)
    for _ in range(_FILL_STEPS):
        middle = (low + high) * 0.5
        over = (middle * weight).clamp(bounds.lower, bounds.upper).sum(1, keepdim=True) > target
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (high * weight).clamp(bounds.lower, bounds.upper)
