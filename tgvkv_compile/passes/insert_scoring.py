"""Insert scoring: per layer, how much the question looks at vision, and what every token is worth."""

from torch.fx import GraphModule, Node

from tgvkv_compile.fx.insert import insert_call, insert_item
from tgvkv_compile.ops.graph_masks import valid_columns, vision_positions
from tgvkv_compile.ops.policy.rank import prefill_scores
from tgvkv_compile.ops.roles import token_roles
from tgvkv_compile.passes.inserted import Scores
from tgvkv_compile.plan import Plan


def insert_scoring(gm: GraphModule, plan: Plan) -> Scores:
    """Adds the roles of the prompt's tokens, and the scores of every layer beside its attention.

    Before::

        %out_l, %lse_l = scaled_dot_product_attention_with_lse(%q_l, %keys_l, ...)

    After::

        %tgvkv_vision : b8[B, N] = vision_positions((%mask,))
        %tgvkv_valid  : b8[B, N] = valid_columns(%attn_mask, %q_0)          # only where attention has a mask
        %tgvkv_roles  : Roles    = token_roles(%tgvkv_vision, %tgvkv_valid)
        %out_l, %lse_l = scaled_dot_product_attention_with_lse(%q_l, %keys_l, ...)
        %tgvkv_scores_l : (f32[B], f32[B, N]) = prefill_scores(%q_l, %keys_l, %tgvkv_roles, %attn_mask, ..., %lse_l)

    Where heads are split over ranks it is `prefill_scores(..., group=...)`, which averages over the ranks what is
    linear in attention, by two functional all-reduces per layer.

    Requires: `normalise_attention` ran. Ensures: attention's output is untouched; nothing inserted holds `[.., N, N]`: with
    the log-sum-exp only question rows and text columns are computed, without it blocks of rows.

    Returns:
        The inserted nodes, for the passes that follow.
    """
    first = plan.sites[0]
    assert plan.modality is not None
    valid: Node | None = None
    attention = first.node.args[0]  # `normalise_attention` made the site an item of it
    assert isinstance(attention, Node)
    with gm.graph.inserting_before(attention):
        vision = insert_call(gm, vision_positions, tuple(plan.modality.masks), name="tgvkv_vision")
        if first.mask is not None:
            valid = insert_call(gm, valid_columns, first.mask, first.query, name="tgvkv_valid")
        roles = insert_call(gm, token_roles, vision, valid, name="tgvkv_roles")
    masses, scores = score_layers(gm, plan, (roles,) * plan.num_layers)
    return Scores(roles, valid, masses, scores)


def score_layers(gm: GraphModule, plan: Plan, roles: tuple[Node, ...]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Adds `prefill_scores` beside the attention of every layer.

    Args:
        gm: The graph.
        plan: Its plan, attention normalised.
        roles: Of the columns of each layer's keys.

    Returns:
        `(mass, score)` per layer: `f32[B]`, `f32[B, S]`.
    """
    masses, scores = [], []
    split = {} if plan.tensor_parallel is None else {"group": plan.tensor_parallel.group}
    for layer, site in enumerate(plan.sites):
        with gm.graph.inserting_after(site.lse or site.node):
            both = insert_call(
                gm,
                prefill_scores,
                site.query,
                site.key.node,
                roles[layer],
                site.mask,
                site.is_causal,
                site.scale,
                site.lse,
                name=f"tgvkv_scores_{layer}",
                **split,
            )
        with gm.graph.inserting_after(both):
            masses.append(insert_item(gm, both, 0, name=f"tgvkv_mass_{layer}"))
        with gm.graph.inserting_after(masses[-1]):
            scores.append(insert_item(gm, both, 1, name=f"tgvkv_score_{layer}"))
    return tuple(masses), tuple(scores)
