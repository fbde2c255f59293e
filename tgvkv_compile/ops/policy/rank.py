"""A layer's tokens, ranked: what stands in graphs, and the same on attention that is there."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig, name_of
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.policy.layer import Layer, Ranked, Ranking, attending, materialised
from tgvkv_compile.ops.policy.named import RANKINGS
from tgvkv_compile.ops.policy.returned import check_tensor
from tgvkv_compile.ops.policy.share import mean_share
from tgvkv_compile.ops.ranks import mean_over_ranks, over_ranks
from tgvkv_compile.ops.token_types import TokenTypes
from tgvkv_compile.ops.weighing import Walk


class TokenRanks(NamedTuple):
    """A ranking's result, complete.

    Attributes:
        mass: float32 `[B]`, the layer's weight.
        score: float32 `[B, S]`.
        tier: int64 `[B, S]`, 0 to 2.
    """

    mass: Tensor
    score: Tensor
    tier: Tensor


def rank_tokens(
    q: Tensor,
    k: Tensor,
    token_types: TokenTypes,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
    *,
    group: str | None = None,
    **options: Any,
) -> TokenRanks:
    """Ranks the tokens of one layer, without ever holding `N x N` attention.

    The rows are the queries of the last `R` columns: `R` is `S` in a prefill.

    Args:
        q: `[B, H, R, D]`, any floating dtype; the maths is float32.
        k: `[B, Hkv, S, D]`, any floating dtype.
        token_types: Of the `S` columns; padding is neither seen nor counted, whatever the mask says.
        attn_mask: `[B | 1, 1 | H, R, S]`, bool (True is visible) or additive (visible where above half of the lowest
            finite value); None if there is none.
        is_causal: Whether rows see no later column, besides what the mask says; only where `R` is `S`.
        scale: The factor on the logits.
        lse: `[B, H, R]` float32, the log-sum-exp of each row's visible logits, where attention gives it
            (`ops.attention.sdpa`): then less is computed.
        group: Name of the process group over whose ranks heads are split: `q`, `k` and `lse` are of this rank's heads, all else
            is equal on all ranks, and so are the bits of the result. None: all heads are here.
        **options: `ranking`, `layer`, `budget` and `budget_of` of [`rank_by_walk`][].
    """
    walk = attending(AttentionRows(q, k, token_types.valid, attn_mask, is_causal, scale, lse))
    if group is not None:
        walk = over_ranks(walk, q.shape[1], group)
    return rank_by_walk(k, token_types, q.shape[2], walk, group=group, **options)


def rank_by_walk(
    key: Tensor,
    token_types: TokenTypes,
    num_rows: int,
    walk: Walk,
    *,
    ranking: str | Ranking = "twr",
    layer: int = 0,
    budget: float | int = 1.0,
    budget_of: str = "all",
    group: str | None = None,
) -> TokenRanks:
    """[`rank_tokens`][], whoever sums the rows of attention.

    Args:
        key: `[B, Hkv, S, D]`.
        token_types: Of the `S` columns.
        num_rows: `R`.
        walk: Sums rows.
        ranking: Name, or function.
        layer: Which layer.
        budget: As of `EvictionConfig`, and so is `budget_of`; with `"vision"` all text stays, whatever the ranking says.
        budget_of: See `budget`.
        group: As there.
    """
    config = EvictionConfig(budget, budget_of)  # type: ignore[arg-type]
    average = functools.partial(_mean_heads, group=group)
    share = mean_share(token_types, config=config)
    one = Layer(key, token_types, num_rows, share, layer, walk, average)
    ranked = RANKINGS[ranking](one) if isinstance(ranking, str) else _checked(ranking(one), token_types, name_of(ranking))
    return _complete(ranked, token_types, config)


def _mean_heads(values: Tensor, group: str | None) -> Tensor:
    mean = values.mean(1)
    return mean if group is None else mean_over_ranks(mean, values.shape[1], group)


@functools.lru_cache(maxsize=64)
def ranked_by(ranking: Ranking) -> Callable[..., TokenRanks]:
    """[`rank_tokens`][] by a function of somebody else's, as a graph calls it: one and the same for each function.

    It belongs to the function's module, so that no cache on disk takes it for one of this package.
    """

    def rank_tokens_by(*args: Any, **options: Any) -> TokenRanks:
        return rank_tokens(*args, ranking=ranking, **options)

    rank_tokens_by.__module__ = getattr(ranking, "__module__", None) or "__main__"
    return rank_tokens_by


def _checked(ranked: object, token_types: TokenTypes, name: str) -> Ranked:
    """Raises [`ConfigError`][] unless a function gave what a ranking must."""
    if not isinstance(ranked, Ranked):
        found = "a Tensor" if isinstance(ranked, Tensor) else type(ranked).__name__
        raise ConfigError(
            f"ranking={name} returned {found}; return Ranked(score, tier=None, layer_weight=None) of tgvkv_compile.policy "
            "(docs/policies.md)"
        )
    tokens = tuple(token_types.valid.shape)
    said = f"ranking={name} returned"
    check_tensor(f"{said} score as", ranked.score, torch.float32, "[B, S]", tokens)
    if ranked.tier is not None:
        check_tensor(f"{said} tier as", ranked.tier, torch.int64, "[B, S]", tokens)
    if ranked.layer_weight is not None:
        check_tensor(f"{said} layer_weight as", ranked.layer_weight, torch.float32, "[B]", tokens[:1])
    return ranked


def _complete(ranked: Ranked, token_types: TokenTypes, config: EvictionConfig) -> TokenRanks:
    none = torch.zeros_like(token_types.positions)
    tier = none if ranked.tier is None else ranked.tier
    if config.budget_of == "vision":  # all text stays
        tier = torch.where(token_types.vision, torch.where(tier > 1, 1, tier), 2)  # no clamp: TensorRT clips floats only
    mass = torch.zeros_like(ranked.score[:, 0]) if ranked.layer_weight is None else ranked.layer_weight
    return TokenRanks(mass, torch.where(token_types.valid, ranked.score, 0.0), tier)


def scores_from_attention(attention: Tensor, visible: Tensor, token_types: TokenTypes) -> tuple[Tensor, Tensor]:
    """TGV-KV's text-vision mass and token scores from materialised attention (`docs/algorithm.md`, Prefill 1, 3, 4).

    Args:
        attention: `[B, R, S]` float32, probabilities averaged over query heads.
        visible: `[B | 1, R, S]` bool, query row sees key column.
        token_types: Of the `S` columns.

    Returns:
        mass: `[B]` float32, `m_l`.
        score: `[B, S]` float32, `s_t` at text, `s_v` at vision, 0 at padding.
    """
    no_keys = attention.new_empty((attention.shape[0], 0, attention.shape[2], 0))
    ranks = rank_by_walk(no_keys, token_types, attention.shape[1], materialised(attention, visible))
    return ranks.mass, ranks.score
