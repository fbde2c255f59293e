"""What the masks that models build say about tokens: which are vision, which are padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask


def visible(mask: Tensor) -> Tensor:
    """Where attention may look.

    Args:
        mask: bool (True = visible), or additive float (0 = visible, `finfo.min` or `-inf` = hidden), any shape.

    Returns:
        bool, the same shape.
    """
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def mask_of_function(
    function: Callable[..., Tensor], captured: tuple[Any, ...], query: Tensor, length: int, *, per_sample: bool
) -> Tensor:
    """The mask that a mask function of flex attention describes.

    Args:
        function: `(b, h, q, kv, *captured) -> bool` of scalar indices (True = visible); the same for all heads.
        captured: What it takes besides the indices.
        query: `[B, H, Q, D]`.
        length: S, how many keys.
        per_sample: Whether it depends on the sample `b`.

    Returns:
        bool `[B, 1, Q, S]`, or `[1, 1, Q, S]` where it does not depend on the sample.
    """

    def of_indices(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return function(b, h, q_idx, kv_idx, *captured)

    batch = query.shape[0] if per_sample else 1
    return create_mask(of_indices, batch, 1, query.shape[2], length, device=query.device)


def valid_columns(mask: Tensor, like: Tensor) -> Tensor:
    """Which key columns exist for the last query: all but padding.

    Args:
        mask: `[B|1, 1|H, Q, S]`, bool or additive float.
        like: Any tensor of the batch, `[B, ...]`: the mask may be shared by all samples.

    Returns:
        bool `[B, S]`.
    """
    last = visible(mask[:, 0, -1, :])
    return last.expand(like.shape[0], last.shape[1])


def visible_among_new(mask: Tensor | None, batch: int, count: int, device: torch.device) -> Tensor:
    """Which tokens of a later turn each token of it sees.

    Args:
        mask: `[B|1, 1|H, Q, S]`, bool or additive float, the new tokens last; None is causal.
        batch: B.
        count: Q.
        device: Of the result.

    Returns:
        bool `[B, Q, Q]`.
    """
    if mask is None:
        causal = torch.ones((count, count), dtype=torch.bool, device=device).tril()
        return causal.expand(batch, count, count)
    new = visible(mask[:, 0, :, mask.shape[3] - count :])
    return new.expand(batch, count, count)


def vision_positions(masks: tuple[Tensor, ...]) -> Tensor:
    """The union of the merge masks.

    Args:
        masks: bool `[B, N, 1]` or `[B, N, hidden]`, at least one.

    Returns:
        bool `[B, N]`.
    """
    union = masks[0][:, :, 0]
    for mask in masks[1:]:
        union = union | mask[:, :, 0]
    return union
