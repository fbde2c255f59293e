"""How far a kernel may be from float64: a small factor of how far plain torch is in the same dtype."""

import torch
from torch import Tensor

FACTOR = 4.0
"""Of the plain reference's greatest error. Both round at other places, so neither bounds the other exactly."""


def check_bounded(kernel: Tensor, plain: Tensor, exact: Tensor, *, largest_logit: float) -> None:
    """The kernel's greatest error against float64 is within `FACTOR` of the plain one's.

    The plain one is sometimes right by luck. Then it is within `FACTOR` of what one rounding does: of the result, or of the
    largest logit in float32, which the exponential turns into a relative error of the result.

    Args:
        kernel: What the kernel gives.
        plain: What plain torch gives from the same inputs, in the same dtype.
        exact: float64.
        largest_logit: Of the attention that the result is made of.
    """
    assert kernel.dtype == plain.dtype and kernel.shape == plain.shape == exact.shape
    error, by_plain = (float((x.double() - exact).abs().max()) for x in (kernel, plain))
    one = max(torch.finfo(kernel.dtype).eps / 2, torch.finfo(torch.float32).eps / 2 * largest_logit)
    limit = FACTOR * max(by_plain, one * float(exact.abs().max()))
    assert error <= limit, f"error {error:.3g} against float64, plain torch {by_plain:.3g}, limit {limit:.3g}"
