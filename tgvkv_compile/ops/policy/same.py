"""The same budget for every layer: what methods that do not speak of layers do."""

from torch import Tensor

from tgvkv_compile.ops.policy.bounds import Bounds


def same(weight: Tensor, bounds: Bounds) -> Tensor:
    """Wants `share [B, L]` of every layer."""
    return bounds.share.expand_as(weight)
