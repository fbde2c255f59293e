"""A layer's tokens, ranked: what stands in graphs, and the same on attention that is there."""

from torch import Tensor

from tgvkv_compile.ops.policy.layer import Layer, attending, materialised
from tgvkv_compile.ops.policy.tgv import twr
from tgvkv_compile.ops.roles import Roles
from tgvkv_compile.ops.tensor_parallel import over_ranks
from tgvkv_compile.ops.weighing import AttentionRows


def prefill_scores(
    q: Tensor,
    k: Tensor,
    roles: Roles,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
    *,
    group: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Text-vision mass and token scores of one layer, without ever holding `N x N` attention.

    The rows are the queries of the last `R` columns: `R` is `S` in a prefill.

    Args:
        q: `[B, H, R, D]`, any floating dtype; the maths is float32.
        k: `[B, Hkv, S, D]`, any floating dtype.
        roles: Of the `S` columns; padding is neither seen nor counted, whatever the mask says.
        attn_mask: `[B | 1, 1 | H, R, S]`, bool (True is visible) or additive (visible where above half of the lowest
            finite value); None if there is none.
        is_causal: Whether rows see no later column, besides what the mask says; only where `R` is `S`.
        scale: The factor on the logits.
        lse: `[B, H, R]` float32, the log-sum-exp of each row's visible logits, where attention gives it
            (`ops.attention`): then only question rows and text columns are computed.
        group: Name of the process group over whose ranks heads are split: `q`, `k` and `lse` are of this rank's heads, all else
            is equal on all ranks, and so are the bits of the result. None: all heads are here.

    Returns:
        mass: `[B]` float32, `m_l`.
        score: `[B, S]` float32, as [`scores_from_attention`][].
    """
    walk = attending(AttentionRows(q, k, roles.valid, attn_mask, is_causal, scale, lse))
    if group is not None:
        walk = over_ranks(walk, q.shape[1], group)
    ranked = twr(Layer(k, roles, q.shape[2], walk))
    return ranked.layer_weight, ranked.score


def scores_from_attention(attention: Tensor, visible: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
    """Text-vision mass and token scores from materialised attention (`docs/algorithm.md`, Prefill 1, 3, 4).

    Args:
        attention: `[B, R, S]` float32, probabilities averaged over query heads.
        visible: `[B | 1, R, S]` bool, query row sees key column.
        roles: Of the `S` columns.

    Returns:
        mass: `[B]` float32, `m_l`.
        score: `[B, S]` float32, `s_t` at text, `s_v` at vision, 0 at padding.
    """
    no_keys = attention.new_empty((attention.shape[0], 0, attention.shape[2], 0))
    ranked = twr(Layer(no_keys, roles, attention.shape[1], materialised(attention, visible)))
    return ranked.layer_weight, ranked.score
