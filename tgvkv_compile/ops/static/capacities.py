"""Budgets under capacities that are fixed before any prompt is seen: what does not fit goes to layers that have room."""

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import BELOW_ONE, Allocation, segment_capacity

# Rounding of a product and a quotient may lift a share by three units in the last place, never by this much.
_SURELY_BELOW = 1.0 - 2.0**-20


def prompt_room(capacity: int, new_tokens: int, *, config: EvictionConfig) -> int:
    """How many prompt entries `capacity` slots can take such that `new_tokens` decode steps always find a free slot.

    What [`segment_capacity`][tgvkv_compile.ops.eviction.budgeting.segment_capacity] adds to them, where the rate allows no
    growth. May be 0 or negative: then it is too small.
    """
    growth = new_tokens if config.decode == "keep" else min(new_tokens, config.sink_tokens + 1)
    return capacity - growth


def fit_allocation(
    allocation: Allocation, lengths: Tensor, capacities: tuple[int, ...], new_tokens: int, *, config: EvictionConfig
) -> Allocation:
    """Clips what each layer keeps to its capacity, and hands the surplus to the layers with room.

    The room of a layer is what its capacity or the prompt leaves. A surplus is shared in proportion to room, what rounding
    leaves over goes to the first layers that can take it, and what no layer can take is lost. Where growth would overrun a
    capacity the layer's rate is lowered to what fits; a handed-on surplus raises no rate, so its layer grows later.

    An allocation that fits comes back bit for bit.

    Args:
        allocation: Of [`allocate`][tgvkv_compile.ops.eviction.budgeting.allocate], `[B, L]`.
        lengths: int64 `[B]`, the `N` of each sample.
        capacities: Slots of each layer, `L` of them, each with room for the forced tokens.
        new_tokens: Decode steps to come, `G`.
        config: `decode` and `sink_tokens`.

    Returns:
        An allocation whose `segment_capacity` is within `capacities`.
    """
    device = lengths.device
    slots = torch.tensor(capacities, dtype=torch.int64, device=device)
    most = torch.tensor([prompt_room(capacity, new_tokens, config=config) for capacity in capacities], device=device)
    wanted = allocation.kept.to(torch.float32)
    limit = torch.minimum(most.to(torch.float32), lengths.to(torch.float32).unsqueeze(1))
    clipped = torch.minimum(wanted, limit)
    kept = clipped + _hand_on((wanted - clipped).sum(1, keepdim=True), limit - clipped)
    kept = kept.to(torch.int64)
    over = segment_capacity(kept, allocation.rate, lengths, new_tokens, config=config) > slots
    total = (lengths + new_tokens).to(torch.float32).unsqueeze(1)
    # Half a token below the bound of `segment_capacity`, so that no rounding reaches it.
    lowered = (slots.to(torch.float32) - 1.5) / total if config.decode == "ratio" else torch.full_like(total, BELOW_ONE)
    return Allocation(kept, torch.where(over, torch.minimum(allocation.rate, lowered), allocation.rate))


def _hand_on(surplus: Tensor, room: Tensor) -> Tensor:
    """Whole numbers `[B, L]` within `room [B, L]` that sum to `surplus [B, 1]`, or to all room if that is less."""
    whole = room.sum(1, keepdim=True)
    surplus = torch.minimum(surplus, whole)
    share = torch.floor(room * (surplus / whole.clamp(min=1.0)) * _SURELY_BELOW)
    spare = room - share
    before = spare.cumsum(1) - spare
    left = surplus - share.sum(1, keepdim=True)
    return share + torch.minimum((left - before).clamp(min=0.0), spare)
