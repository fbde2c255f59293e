"""Insert scoring: per layer, how much the question looks at vision, and what every token is worth."""

from typing import Any

from torch.fx import Node

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.ops.attention.masks import valid_columns, vision_positions
from tgvkv_compile.ops.policy.named import LAYERS_ALIKE
from tgvkv_compile.ops.policy.rank import TokenRanks, rank_tokens, ranked_by
from tgvkv_compile.ops.token_types import classify_tokens
from tgvkv_compile.passes.inserted import Scores
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.passes.told import told


def insert_scoring(rewrite: Rewrite) -> None:
    """Adds the token types of the prompt's tokens, and the scores of every layer beside its attention.

    Before::

        %out_l, %lse_l = scaled_dot_product_attention_with_lse(%q_l, %keys_l, ...)

    After::

        %tgvkv_vision : b8[B, N] = vision_positions((%mask,))
        %tgvkv_valid  : b8[B, N] = valid_columns(%attn_mask, %q_0)          # only where attention has a mask
        %tgvkv_types  : TokenTypes = classify_tokens(%tgvkv_vision, %tgvkv_valid)
        %out_l, %lse_l = scaled_dot_product_attention_with_lse(%q_l, %keys_l, ...)
        %tgvkv_ranks_l : TokenRanks = rank_tokens(%q_l, %keys_l, %tgvkv_types, %attn_mask, ..., %lse_l, ranking=...)
        %tgvkv_mass_l  : f32[B]     = %tgvkv_ranks_l.mass      # and %tgvkv_score_l : f32[B, N], %tgvkv_tier_l : i64[B, N]

    Where heads are split over ranks it is `rank_tokens(..., group=...)`, which averages over the ranks what is
    linear in attention, by two functional all-reduces per layer.

    Requires: `normalise_attention` ran. Ensures: attention's output is untouched; nothing inserted holds `[.., N, N]`: with
    the log-sum-exp only question rows and text columns are computed, without it blocks of rows.
    """
    gm, plan = rewrite.gm, rewrite.plan
    first = plan.sites[0]
    attention = first.node.args[0]  # `normalise_attention` made the site an item of it
    assert isinstance(attention, Node)
    with gm.graph.inserting_before(attention):
        token_types, valid = insert_token_types(rewrite, first.query)
    rewrite.leave(Scores(token_types, valid, *rank_layers(rewrite, (token_types,) * plan.num_layers)))


def insert_token_types(rewrite: Rewrite, like: Node) -> tuple[Node, Node | None]:
    """Adds the token types of a prompt's tokens, at the place where the graph inserts now.

    Args:
        rewrite: The graph of a prefill.
        like: A node whose value has the batch in its first dimension.

    Returns:
        `(token_types, valid)`: `TokenTypes`, and b8[B, N], None where nothing is masked.
    """
    gm, plan = rewrite.gm, rewrite.plan
    assert plan.modality is not None
    mask, valid = plan.sites[0].mask, None
    vision = insert_call(gm, vision_positions, tuple(plan.modality.masks), name="tgvkv_vision")
    if mask is not None:
        valid = insert_call(gm, valid_columns, mask, like, name="tgvkv_valid")
    return insert_call(gm, classify_tokens, vision, valid, name="tgvkv_types"), valid


def rank_layers(rewrite: Rewrite, token_types: tuple[Node, ...]) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
    """Adds the ranking beside the attention of every layer.

    Args:
        rewrite: The graph, attention normalised.
        token_types: Of the columns of each layer's keys.

    Returns:
        `(mass, score, tier)` per layer: `f32[B]`, `f32[B, S]`, `i64[B, S]`.
    """
    gm, plan, config = rewrite.gm, rewrite.plan, rewrite.config
    options = config.for_ranking()
    function: Any = rank_tokens
    if not isinstance(config.ranking, str):
        function = ranked_by(options.pop("ranking"))  # a graph's constants are plain values
    if plan.tensor_parallel is not None:
        options["group"] = plan.tensor_parallel.group
    found = []
    for layer, site in enumerate(plan.sites):
        given = (site.query, site.key.node, site.mask, site.lse, token_types[layer])
        number = {} if config.ranking in LAYERS_ALIKE else {"layer": layer}
        with gm.graph.inserting_after(site.lse or site.node), told("ranking", config.ranking, given):
            ranks = insert_call(
                gm,
                function,
                site.query,
                site.key.node,
                token_types[layer],
                site.mask,
                site.is_causal,
                site.scale,
                site.lse,
                name=f"tgvkv_ranks_{layer}",
                **options,
                **number,
            )
        parts: list[Node] = []
        for part in TokenRanks._fields:
            with gm.graph.inserting_after(parts[-1] if parts else ranks):
                parts.append(insert_item(gm, ranks, part, name=f"tgvkv_{part}_{layer}"))
        found.append(tuple(parts))
    masses, scores, tiers = zip(*found, strict=True)
    return masses, scores, tiers
