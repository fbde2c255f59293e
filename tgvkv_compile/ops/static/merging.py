"""Vision features into token embeddings, for graphs of static shapes: a prefix sum and a gather.

`masked_scatter` and boolean indices stand for data of unknown number, which engines do not have.
"""

import torch
from torch import Tensor

from tgvkv_compile.ops.token_types import prefix_count


def merge_features(embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """`embeds.masked_scatter(mask, features)`: the vision tokens of the batch take the rows of `features` in their order.

    Args:
        embeds: `[B, N, hidden]`.
        mask: bool `[B, N, 1]` or `[B, N, hidden]`, all of a token or none of it.
        features: `[.., hidden]`, one row per True token. Rows too many are left over; of too few the last stands for those
            that are missing (whoever calls counts them first).

    Returns:
        `[B, N, hidden]`.
    """
    return torch.where(mask, spread(mask[:, :, 0], features).to(embeds.dtype), embeds)


def add_features(hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """`hidden[mask] += features`: what Qwen3-VL's first layers add to the vision tokens.

    Args:
        hidden: `[B, N, hidden]`.
        mask: bool `[B, N]`.
        features: `[.., hidden]`, as in `merge_features`.

    Returns:
        `[B, N, hidden]`.
    """
    return torch.where(mask.unsqueeze(2), hidden + spread(mask, features).to(hidden.dtype), hidden)


def spread(mask: Tensor, features: Tensor) -> Tensor:
    """Row `i` of `features [.., hidden]` at the `i`-th True of `mask [B, N]`, counted through the batch: `[B, N, hidden]`."""
    rows = features.reshape(-1, features.shape[-1])
    place = prefix_count(mask.reshape(1, -1)) - 1.0
    index = place.clamp(0.0, rows.shape[0] - 1.0).to(torch.int64)
    return rows.index_select(0, index[0]).reshape(mask.shape[0], mask.shape[1], rows.shape[1])
