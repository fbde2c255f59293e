"""How many entries layers keep on average."""

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.token_types import TokenTypes, vision_count


def budgeted(tokens: Tensor, config: EvictionConfig) -> Tensor:
    """`rho` times the tokens that the budget is a fraction of: entries per layer on average."""
    if isinstance(config.limit, int):
        return tokens.clamp(max=config.limit)
    return tokens * config.limit


def mean_share(token_types: TokenTypes, *, config: EvictionConfig) -> Tensor:
    """float32 `[B]`: how many entries layers keep on average, before rounding."""
    length = token_types.lengths.to(torch.float32)
    if config.budget_of == "all":
        return budgeted(length, config)
    vision = vision_count(token_types, config=config).to(torch.float32)
    return length - vision + budgeted(vision, config)
