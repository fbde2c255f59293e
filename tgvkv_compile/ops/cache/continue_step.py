"""Custom op `tgvkv::continue_step`: several new tokens join a layer's segment and attend; nothing is evicted."""

import functools
from typing import Any

import torch
from torch import Tensor, library

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.attention.masks import valid_columns, visible_among_new
from tgvkv_compile.ops.cache.segments import NewTokens, append, attend_segment
from tgvkv_compile.ops.state import WRITTEN_BY_STEPS, CompactState, read_state, state_schema


@library.custom_op(
    "tgvkv::continue_step",
    mutates_args=WRITTEN_BY_STEPS,
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor? mask, {state_schema(*WRITTEN_BY_STEPS)}, "
    "SymInt layer, float scale, str? kv_dtype=None) -> Tensor",
)
def _continue_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    state, (layer, scale, *held) = read_state(rest)
    batch, _, count, _ = query.shape
    among_new = visible_among_new(mask, batch, count, query.device)  # [B, Q, Q]
    valid = among_new[:, -1]  # [B, Q]
    rank = valid.long().cumsum(1) - 1
    start, length, lengths = state.segment_start[:, layer], state.segment_len[:, layer], state.lengths
    # The first new token fills the slot that was evicted last, the others go behind the segment's end.
    slot = torch.where(rank == 0, state.next_slot[:, layer, None], start[:, None] + length[:, None] + rank)
    slot = torch.where(valid, slot, state.slot_position.shape[1] - 1)
    new = NewTokens(key, value, torch.where(valid, lengths[:, None] + rank, -1), slot, layer, *held)
    append(state, new)

    grown = length + valid.sum(1)
    sees = functools.partial(_visible, among_new=among_new, valid=valid, rank=rank, lengths=lengths)
    seen = attend_segment(query, state, start, grown, scale, new, sees)

    state.segment_len[:, layer] = grown
    state.next_slot[:, layer] = start + grown
    state.protect_from[:, layer] = lengths
    return seen.output


def _visible(positions: Tensor, *, among_new: Tensor, valid: Tensor, rank: Tensor, lengths: Tensor) -> Tensor:
    """Which entries each new token sees, bool `[B, Q, W]`: every old one, and a new one as the mask among new tokens says.

    Args:
        positions: int64 `[B, W]`, of the entries, -1 where empty.
        among_new: bool `[B, Q, Q]`.
        valid: bool `[B, Q]`, which new tokens are not padding.
        rank: int64 `[B, Q]`, their places among those.
        lengths: int64 `[B]`, tokens before them.
    """
    batch, count = valid.shape
    column = (positions - lengths[:, None]).clamp(min=0, max=count)  # rank of a new entry
    source = torch.where(valid, rank, count).clamp(max=count)
    by_rank = torch.zeros((batch, count, count + 1), dtype=torch.bool, device=valid.device)
    by_rank.scatter_(2, source[:, None, :].expand(-1, count, -1), among_new)
    new_seen = by_rank.gather(2, column[:, None, :].expand(-1, count, -1))
    old = (positions >= 0) & (positions < lengths[:, None])
    return old[:, None, :] | (new_seen & (positions >= lengths[:, None])[:, None, :])


@_continue_step.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def continue_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: CompactState,
    *,
    layer: int,
    scale: float,
    kv_dtype: KVDtype | None = None,
) -> Tensor:
    """Several new tokens of a later turn, on one layer's segment; the state is updated in place.

    All new tokens are kept and become the protected suffix; nothing is evicted (algorithm, Continuation).

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, Q, D]`.
        value: `[B, Hkv, Q, D]`.
        mask: `[B|1, 1|H, Q, S]` over the logical sequence, or None (causal). Columns of padding are left out.
        state: The compact cache; `lengths` counts the tokens before these and is left as it is.
        layer: Which segment.
        scale: What `q @ k` is multiplied by.
        kv_dtype: How the arenas hold keys and values, see `EvictionConfig`.

    Returns:
        The attention output `[B, H, Q, D]`, dtype of `query`.
    """
    output: Tensor = torch.ops.tgvkv.continue_step(query, key, value, mask, *state, layer, scale, kv_dtype)
    return output


def advance_lengths(lengths: Tensor, mask: Tensor | None, new: Tensor) -> Tensor:
    """`lengths` `[B]` plus the new tokens of each sample, `new` `[B, Hkv, Q, D]`, padding left out."""
    count = new.shape[2]
    if mask is None:
        return lengths + count
    valid = valid_columns(mask, lengths)
    return lengths + valid[:, valid.shape[1] - count :].sum(1)
