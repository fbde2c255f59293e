"""The tensors of a compact cache, in the order in which rewritten graphs take and return them."""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class CompactState(NamedTuple):
    """All layers' kept KV in one arena per K and V, each layer a segment of it.

    Attributes:
        key_arena: `[B, Hkv, T, D]`, dtype of the model's keys; uint8 `[B, Hkv, T, R]` where quantised (`ops.cache.rows`).
            Keys keep the rotary embedding of their true position.
        value_arena: Likewise.
        slot_position: int32 `[B, T]`, position of the token in each slot (padding not counted), -1 where empty.
            The last slot belongs to no segment: what is evicted at prefill is written there.
        segment_start: int64 `[B, L]`, first slot of each layer. The first one is 0, or what windows take (`ops.cache.window`).
        segment_len: int64 `[B, L]`, entries that the next step can attend to.
        next_slot: int64 `[B, L]`, where the next token goes: the slot evicted last, else the end of the segment.
        protect_from: int64 `[B, L]`, first position of the protected suffix (algorithm, Decode 3).
        keep_rate: float32 `[B, L]`, `r_l`.
        lengths: int64 `[B]`, tokens of the sample so far, padding not counted (`N + t`).
    """

    key_arena: Tensor
    value_arena: Tensor
    slot_position: Tensor
    segment_start: Tensor
    segment_len: Tensor
    next_slot: Tensor
    protect_from: Tensor
    keep_rate: Tensor
    lengths: Tensor


WRITTEN_BY_STEPS = ("key_arena", "value_arena", "slot_position", "segment_len", "next_slot", "protect_from")
"""What a step changes in place, whether of one token or of several."""


def state_schema(*written: str) -> str:
    """A [`CompactState`][] as arguments of an op's schema: custom ops take tensors one by one.

    Args:
        *written: The fields that the op writes to.
    """
    letters = dict(zip(written, string.ascii_lowercase, strict=False))
    return ", ".join(
        f"Tensor({letters[name]}!) {name}" if name in letters else f"Tensor {name}" for name in CompactState._fields
    )


def read_state(arguments: Sequence[Any]) -> tuple[CompactState, Sequence[Any]]:
    """Takes a [`CompactState`][] off the front of an op's arguments, which are as its schema lists them."""
    count = len(CompactState._fields)
    return CompactState(*arguments[:count]), arguments[count:]


class Prefilled(NamedTuple):
    """What a prefill tells beside its `CompactState`, at the end of its outputs, in this order.

    Attributes:
        history: bool `[B, N]`, which positions are vision.
        room: int64 `[]`, decode steps that every segment has slots for.
        valid: bool `[B, N]`, which columns of the prompt are not padding; None: all of them.
    """

    history: Tensor
    room: Tensor
    valid: Tensor | None


class Choice(NamedTuple):
    """Which of a layer's candidates a later turn with new vision keeps.

    Attributes:
        keep: bool `[B, W + Q]`.
        positions: int64 `[B, W + Q]`, of the candidates; -1 where there is none.
    """

    keep: Tensor
    positions: Tensor


class Reselected(NamedTuple):
    """What a later turn with new vision decides, at the end of its outputs, in this order.

    Attributes:
        kept: int64 `[B, L]`, how many candidates each layer keeps.
        keep_rate: float32 `[B, L]`, `r_l` from now on.
        protect_from: int64 `[B, L]`, first position of the protected suffix.
        lengths: int64 `[B]`, tokens of the sample so far, this turn's included.
        valid: bool `[B, Q]`, which of the turn's tokens are not padding.
        history: bool `[B, P + Q]`, which positions are vision.
    """

    kept: Tensor
    keep_rate: Tensor
    protect_from: Tensor
    lengths: Tensor
    valid: Tensor
    history: Tensor


class Survivors(NamedTuple):
    """What one layer still holds, in position order, as a later turn with new vision takes it in.

    Attributes:
        key: `[B, Hkv, W, D]`.
        value: `[B, Hkv, W, D]`.
        positions: int64 `[B, W]`, -1 where a sample holds fewer than `W`.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


def split_off(results: Sequence[Any], record: Any) -> tuple[list[Any], Any]:
    """Takes a record off the end of what a graph returned.

    Args:
        results: Of the graph.
        record: A `NamedTuple` class.

    Returns:
        The results before it, and the record.
    """
    end = len(results) - len(record._fields)
    return list(results[:end]), record(*results[end:])
