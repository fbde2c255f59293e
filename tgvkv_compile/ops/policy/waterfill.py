"""Text-vision budgeting that meets its total: layers that clamp hand what they cannot hold to the others."""

from torch import Tensor

from tgvkv_compile.ops.policy.bounds import Bounds, fill


def waterfill(weight: Tensor, bounds: Bounds) -> Tensor:
    """Wants `clamp(c * w_l, lower, upper) [B, L]`, `c` such that they sum to `L * share` (see `fill`)."""
    return fill(weight, bounds)
