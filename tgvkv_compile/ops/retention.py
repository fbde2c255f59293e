"""Text-Prioritised Retention: which tokens of the prompt a layer keeps (paper section 4.3)."""

import torch
from torch import Tensor

from tgvkv_compile.ops.roles import Roles, forced_tokens


def retain(score: Tensor, roles: Roles, kept: Tensor, *, sink_tokens: int) -> Tensor:
    """Keeps exactly `kept` tokens: the forced ones, then text by score, then vision by score.

    The sink positions and the last are forced. Text outranks vision by rank, not by a constant added to its score,
    which would round it. Of equal scores the earlier position goes first. Padding is never kept. A NaN counts as 0.

    Args:
        score: `[B, N]` float32, of [`scores_from_attention`][tgvkv_compile.ops.policy.rank.scores_from_attention].
        roles: Of the `N` tokens.
        kept: `[B]` int64, how many tokens to keep: at least the forced ones, at most the valid ones.
        sink_tokens: How many first positions are forced.

    Returns:
        `[B, N]` bool with `kept` True per row.
    """
    forced = forced_tokens(roles, sink_tokens=sink_tokens)
    text = roles.valid & ~roles.vision
    priority = torch.where(forced, 3, torch.where(text, 2, roles.vision.to(torch.int64)))
    # Least important column last: stable sorts by score, then by priority, of the columns from last to first.
    by_score = score.nan_to_num(nan=0.0).flip(1).sort(dim=1, descending=True, stable=True).indices
    by_priority = priority.flip(1).gather(1, by_score).sort(dim=1, descending=True, stable=True).indices
    order = by_score.gather(1, by_priority)
    best = torch.arange(score.shape[1], device=score.device) < kept.unsqueeze(1)
    keep = torch.zeros_like(roles.valid).scatter(1, order, best)
    return keep.flip(1) & roles.valid
