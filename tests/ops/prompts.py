"""Prompts and attention that the tests of the maths share."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.attention.rows import AttentionRows
from tgvkv_compile.ops.eviction.budgeting import allocate
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.rank import rank_tokens, scores_from_attention
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens, vision_count

DATA = Path(__file__).parents[1] / "data"


@functools.cache
def recorded() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The recorded cases of the authors' code and their attention, by name."""
    cases = json.loads((DATA / "attention_cases.json").read_text())
    with np.load(DATA / "attention_cases.npz") as arrays:
        return cases, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def prefill_scores(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Mass and scores of `rank_tokens`, by TGV-KV's own ranking."""
    ranks = rank_tokens(*args, **options)
    return ranks.mass, ranks.score


def case_name(case: dict[str, Any]) -> str:
    return f"seed{case['seed']}-{case['budget']}"


def case_vision(case: dict[str, Any]) -> Tensor:
    return vision_at(case["N"], (case["image_start"], case["num_vision"]))


def vision_at(length: int, *spans: tuple[int, int]) -> Tensor:
    """`[length]` bool, True in each span of (start, count)."""
    vision = torch.zeros(length, dtype=torch.bool)
    for start, count in spans:
        vision[start : start + count] = True
    return vision


def causal(length: int) -> Tensor:
    """`[length, length]` bool."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def random_attention(layers: int, length: int, *, seed: int, sharpness: float = 2.0) -> Tensor:
    """`[layers, length, length]` float32 causal probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(layers, length, length, generator=generator)
    return logits.masked_fill(~causal(length), float("-inf")).softmax(-1)


def indices(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero().flatten()]


@dataclasses.dataclass
class Layer:
    """Inputs of `prefill_scores` for one layer."""

    q: Tensor
    k: Tensor
    token_types: TokenTypes
    attn_mask: Tensor | None
    is_causal: bool
    scale: float

    def visible(self) -> Tensor:
        """`[B, 1 | H, N, N]` bool, materialised the obvious way."""
        length = self.q.shape[2]
        seen = self.token_types.valid[:, None, None, :].expand(-1, 1, length, -1)
        if self.is_causal:
            seen = seen & causal(length)
        if self.attn_mask is not None:
            mask = self.attn_mask
            seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
        return seen

    def materialised_scores(self) -> tuple[Tensor, Tensor]:
        visible = self.visible()
        attention = attention_probabilities(self.q, self.k, visible, self.scale).mean(1)
        return scores_from_attention(attention, visible.any(1), self.token_types)

    def rows(self, lse: Tensor | None = None) -> AttentionRows:
        """Of the op, behind `weights` and `wanted`."""
        return AttentionRows(self.q, self.k, self.token_types.valid, self.attn_mask, self.is_causal, self.scale, lse)

    def scores(self, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return prefill_scores(self.q, self.k, self.token_types, self.attn_mask, self.is_causal, self.scale, lse)

    def weights(self, count: int = 2) -> Tensor:
        """`[B, count, N]` weights of rows, 0 at padding and where a sample has no question."""
        generator = torch.Generator().manual_seed(7)
        weights = torch.rand(self.q.shape[0], count, self.q.shape[2], generator=generator)
        return weights * self.token_types.question.unsqueeze(1)


def make_layer(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    length: int = 20,
    dim: int = 4,
    vision: Tensor | None = None,
    padding: tuple[int, ...] = (),
    mask: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """A layer on random queries and keys.

    Args:
        padding: Left padding of each sample; none by default.
        mask: `"none"` (causal by flag), `"bool"`, `"additive"`, `"per-head"` (causal and padded by the mask),
            `"prefix"` (everything but the last quarter sees itself in both directions) or `"both"` (flag and mask).
    """
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, length, dim, generator=generator)
    k = torch.randn(batch, kv_heads, length, dim, generator=generator)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for sample, count in enumerate(padding):
        valid[sample, :count] = False
    if vision is None:
        vision = vision_at(length, (length // 4, length // 3)).expand(batch, -1)
    token_types = classify_tokens(vision, valid)
    seen = valid[:, None, None, :] & causal(length)
    attn_mask = None
    if mask in ("bool", "both"):
        attn_mask = seen
    elif mask == "additive":
        attn_mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    elif mask == "per-head":
        attn_mask = seen.expand(-1, heads, -1, -1)
    elif mask == "prefix":
        prefix = torch.arange(length) < length * 3 // 4
        attn_mask = valid[:, None, None, :] & (causal(length) | (prefix & prefix[:, None]))
    return Layer(q.to(dtype), k.to(dtype), token_types, attn_mask, mask in ("none", "both"), dim**-0.5)


def keep_per_layer(attention: Tensor, token_types: TokenTypes, config: EvictionConfig) -> list[list[list[int]]]:
    """Kept indices per sample and layer, from `attention [L, B, N, N]`: prefill on a batch, without the oracle."""
    length = attention.shape[2]
    visible = causal(length) & token_types.valid[:, None, :]
    scored = [scores_from_attention(layer, visible, token_types) for layer in attention]
    masses = torch.stack([mass for mass, _ in scored], dim=1)
    kept = allocate(masses, token_types.lengths, vision_count(token_types, config=config), config=config).kept
    keeps = [
        select_tokens(score, text_first(token_types), token_types, kept[:, layer], sink_tokens=config.sink_tokens)
        for layer, (_, score) in enumerate(scored)
    ]
    return [[indices(keep[sample]) for keep in keeps] for sample in range(attention.shape[1])]


@st.composite
def configs(draw: st.DrawFn, /, **fixed: Any) -> EvictionConfig:
    """Every combination of options."""
    budget = st.one_of(
        st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]),
        st.floats(0.001, 1.0),
        st.integers(1, 80),
    )
    options: dict[str, Any] = {
        "budget": draw(budget),
        "budget_of": draw(st.sampled_from(["all", "vision"])),
        "budgeting": draw(st.sampled_from(["tvb", "waterfill", "uniform", "pyramid"])),
        "decode": draw(st.sampled_from(["ratio", "fixed", "keep"])),
        "sink_tokens": draw(st.sampled_from([0, 1, 4, 4, 4, 7])),
    }
    return EvictionConfig(**(options | fixed))


@st.composite
def vision_masks(draw: st.DrawFn, *, min_length: int = 1, max_length: int = 40) -> Tensor:
    """`[N]` bool with up to three image spans anywhere, at the ends too, or none."""
    length = draw(st.integers(min_length, max_length))
    spans = draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), max_size=3))
    return vision_at(length, *spans)


@st.composite
def masses(draw: st.DrawFn, *, max_layers: int = 8) -> Tensor:
    """`[L]` float32: alike, skewed over many orders of magnitude, or zero in places."""
    value = st.one_of(st.just(0.0), st.floats(0.1, 10.0), st.floats(-12.0, 4.0).map(lambda power: 10.0**power))
    return torch.tensor(draw(st.lists(value, min_size=1, max_size=max_layers)), dtype=torch.float32)
