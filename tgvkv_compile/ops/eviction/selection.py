"""Selection: which tokens of the prompt a layer keeps, tier by tier (text before vision: paper section 4.3)."""

import torch
from torch import Tensor

from tgvkv_compile.ops.token_types import TokenTypes, forced_tokens

_FORCED = 4
"""Above padding (0) and the tiers (1 to 3)."""


def select_tokens(score: Tensor, tier: Tensor, token_types: TokenTypes, kept: Tensor, *, sink_tokens: int) -> Tensor:
    """Keeps exactly `kept` tokens: the forced ones, then tier by tier by score.

    The sink positions and the last are forced. A tier outranks the one below by rank, not by a constant added to its score,
    which would round it. Of equal scores the earlier position goes first. Padding is never kept. A NaN counts as 0.

    Args:
        score: `[B, N]` float32, of [`rank_tokens`][tgvkv_compile.ops.policy.rank.rank_tokens].
        tier: `[B, N]` int64, 0 to 2, of the same.
        token_types: Of the `N` tokens.
        kept: `[B]` int64, how many tokens to keep: at least the forced ones, at most the valid ones.
        sink_tokens: How many first positions are forced.

    Returns:
        `[B, N]` bool with `kept` True per row.
    """
    forced = forced_tokens(token_types, sink_tokens=sink_tokens)
    priority = torch.where(forced, _FORCED, torch.where(token_types.valid, tier + 1, 0))
    # Least important column last: stable sorts by score, then by priority, of the columns from last to first.
    by_score = score.nan_to_num(nan=0.0).flip(1).sort(dim=1, descending=True, stable=True).indices
    by_priority = priority.flip(1).gather(1, by_score).sort(dim=1, descending=True, stable=True).indices
    order = by_score.gather(1, by_priority)
    best = torch.arange(score.shape[1], device=score.device) < kept.unsqueeze(1)
    keep = torch.zeros_like(token_types.valid).scatter(1, order, best)
    return keep.flip(1) & token_types.valid
