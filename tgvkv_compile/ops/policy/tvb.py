"""TGV-KV: text-vision budgeting (paper section 4.1, arXiv 2606.03075; `docs/algorithm.md`, Prefill 2)."""

from torch import Tensor

from tgvkv_compile.ops.policy.bounds import Bounds


def tvb(weight: Tensor, bounds: Bounds) -> Tensor:
    """Wants `k_l = L * share * w_l [B, L]`, as released: what a clamped layer cannot hold is not handed to the others."""
    return bounds.share * weight.shape[1] * weight
