"""TGV-KV: text-weighted ranking (paper sections 4.1 to 4.3, arXiv 2606.03075; `docs/algorithm.md`, Prefill 1, 3, 4)."""

import torch
from torch import Tensor

from tgvkv_compile.ops.policy.layer import Layer, Ranked
from tgvkv_compile.ops.token_types import TokenTypes


def twr(layer: Layer) -> Ranked:
    """Vision is worth what the question's tokens see in it, each by the attention that it receives from the question.

    Of the question `R`, `u_j` is the mean attention that token `j` receives from the question tokens that see it; vision token
    `t` scores `s_v = sum_j u_j A[j, t]`. Text scores what it receives from all rows, `s_t`, and stays before vision. The layer
    weighs what the question's rows give vision, `m_l`. "`i >= j`" of the formulas is "`i` sees `j`" here, which is the same for
    causal attention and right for the others.

    Returns:
        `score [B, S]`: `s_t` at text, `s_v` at vision, 0 at padding; `tier`: 1 at text; `layer_weight [B]`: `m_l`.
    """
    tokens = layer.tokens
    text = tokens.valid & ~tokens.vision
    received, asked = layer.weigh((layer.rows(tokens.valid), text), (layer.rows(tokens.question), None))
    worth = torch.where(tokens.question, asked.sums / asked.seen.clamp(min=1.0), 0.0)
    (grounded,) = layer.weigh((layer.rows(worth), tokens.vision))
    mass = torch.where(tokens.vision, asked.sums, 0.0).sum(1)
    score = torch.where(tokens.valid, torch.where(tokens.vision, grounded.sums, received.sums), 0.0)
    return Ranked(score, text_first(tokens), mass)


def text_first(tokens: TokenTypes) -> Tensor:
    """Text-prioritised retention (section 4.3, in the paper's words): int64 `[B, S]`, 1 at text, which stays before vision."""
    return (tokens.valid & ~tokens.vision).to(torch.int64)
