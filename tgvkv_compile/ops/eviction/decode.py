"""What one decode step evicts (`docs/algorithm.md`, Decode)."""

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig

_NOWHERE = torch.iinfo(torch.int64).max


def next_protected(positions: Tensor, protect_from: Tensor) -> Tensor:
    """Slides the protected suffix by one element: the smallest present position above `protect_from`.

    The rule (Decode 3) is: list the kept positions of the question, then `N, N + 1, …`; after `t` generated tokens the
    elements from number `t` on are protected. Let `protect_from` be element `t - 1`. Elements `t - 1, t, …` were
    protected until now, so all of them that exist are present. Every present position above element `t - 1` is in the
    list, because the question holds *every* text position after the last vision token (or the prompt's last position
    alone), and generated positions come after it. So the smallest present position above element `t - 1` is element
    `t`. It exists: the list began with at least one element (the last position is always kept and always in the
    question) and has grown by one for each of the `t` tokens, of which the newest is present when this is called.

    Args:
        positions: `[B, S]` int64, the position in each slot, the new token's included; -1 where a slot is empty.
        protect_from: `[B]` int64, the first protected position before this step.

    Returns:
        `[B]` int64, the first protected position of this step; `protect_from` itself where nothing is above it.
    """
    above = positions > protect_from.unsqueeze(1)
    following = torch.where(above, positions.to(torch.int64), _NOWHERE).amin(1)
    return torch.where(above.any(1), following, protect_from)


def choose_eviction(
    attention: Tensor,
    positions: Tensor,
    length: Tensor,
    total: Tensor,
    rate: Tensor,
    protect_from: Tensor,
    *,
    config: EvictionConfig,
) -> Tensor:
    """Chooses the at most one slot to evict after a decode step (Decode 2).

    An entry can go if its position is at least `sink_tokens` and below `protect_from`. Of those the one with the
    smallest attention of this step goes; of equals, the earlier position. Whether one goes:

    - `"ratio"`: if `length - total * rate`, in float32, is at least 1;
    - `"fixed"`: always, unless `rate` is exactly 1, which
      [`allocate`][tgvkv_compile.ops.eviction.budgeting.allocate] gives in this mode only to samples that never lose anything;
    - `"keep"`: never.

    Args:
        attention: `[B, S]` float32, this step's attention to each slot, averaged over query heads.
        positions: `[B, S]` int64, the position in each slot in any order; -1 where a slot is empty.
        length: `[B]` int64, occupied slots, the new token's included.
        total: `[B]` int64, prompt and generated tokens so far, `N + t`.
        rate: `[B]` float32, the layer's keep rate `r_l`.
        protect_from: `[B]` int64, of [`next_protected`][], already advanced for this step.
        config: `decode` and `sink_tokens`.

    Returns:
        `[B]` int64, an index into `S`, or -1 where nothing is evicted.
    """
    if config.decode == "keep":
        return torch.full_like(length, -1)
    over = length.to(torch.float32) - total.to(torch.float32) * rate
    due = rate != 1.0 if config.decode == "fixed" else over >= 1.0  # truncated: int(over) >= 1
    evictable = (positions >= config.sink_tokens) & (positions < protect_from.unsqueeze(1))
    smallest = attention.masked_fill(~evictable, float("inf")).amin(1, keepdim=True)
    candidates = evictable & (attention <= smallest)
    chosen = torch.where(candidates, positions.to(torch.int64), _NOWHERE).argmin(1)
    return torch.where(due & evictable.any(1), chosen, -1)
