"""Random compact caches in the middle of a request, and what a step on them is in float64."""

import dataclasses

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.rows import RowForm, from_rows, to_rows
from tgvkv_compile.ops.cache.window import has_window, read_window, sizes_of, write_window
from tgvkv_compile.ops.state import CompactState


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A decode step of layer `layer`: `query [B, H, 1, D]`, `key` and `value` `[B, Hkv, 1, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    state: CompactState
    layer: int
    scale: float
    kv_dtype: KVDtype | None = None

    def fresh(self) -> CompactState:
        """The state in tensors of its own."""
        return CompactState(*(tensor.clone() for tensor in self.state))

    def exact(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """In float64: output `[B, H, 1, D]`, head-mean attention `[B, W]`, positions `[B, W]` (-1 behind), largest logit."""
        state, layer = self.state, self.layer
        batch, heads, _, dim = self.query.shape
        kv_heads = state.key_arena.shape[1]
        width = int(state.segment_len[:, layer].max()) + 1
        output = torch.zeros(batch, heads, 1, dim, dtype=torch.float64)
        attention = torch.zeros(batch, width, dtype=torch.float64)
        positions = torch.full((batch, width), -1)
        largest = 0.0
        for sample in range(batch):
            start = int(state.segment_start[sample, layer])
            count = int(state.segment_len[sample, layer]) + 1
            new = int(state.next_slot[sample, layer]) - start
            place = state.slot_position[sample, start : start + count].long()
            place[new] = state.lengths[sample]
            keys, values = (
                self._read(arena, sample, slice(start, start + count), place, keys=arena is state.key_arena).double()
                for arena in (state.key_arena, state.value_arena)
            )
            # A cache of another dtype rounds what is put into it, but codes are for later steps.
            whole = self.kv_dtype is not None
            keys[:, new] = (self.key if whole else self.key.to(state.key_arena.dtype))[sample, :, 0].double()
            values[:, new] = (self.value if whole else self.value.to(state.value_arena.dtype))[sample, :, 0].double()
            keys, values = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (keys, values))
            logits = (self.query[sample].double() @ keys.transpose(1, 2) * self.scale)[:, 0]
            largest = max(largest, float(logits.abs().max()))
            weights = logits.masked_fill(place < 0, float("-inf")).softmax(-1)
            output[sample] = weights[:, None] @ values
            attention[sample, :count] = weights.mean(0)
            positions[sample, :count] = place
        return output, attention, positions, largest

    def _read(self, arena: Tensor, sample: int, part: slice, positions: Tensor, *, keys: bool) -> Tensor:
        """Of the slots `part`, float32 `[Hkv, W, D]`."""
        form = RowForm(self.kv_dtype, self.key.shape[3], torch.float32)
        one = slice(sample, sample + 1)
        read = from_rows(arena[one, :, part], form, keys=keys)
        if has_window(self.kv_dtype):
            # The new token takes the entry of the one that is there.
            size = sizes_of(self.state.segment_start)[one]
            there = torch.where(positions % size == self.state.lengths[sample] % size, -1, positions[None])
            read = read_window(read, arena[one], self.state.slot_position[one], there, form, size, layer=self.layer, keys=keys)
        return read[0]


def quantised(case: StepCase, kv_dtype: KVDtype, entries: int = 16) -> StepCase:
    """The same step on arenas of codes, with windows of so many entries where these have some."""
    state, layers = case.state, case.state.segment_start.shape[1]
    before = 2 * layers * entries if has_window(kv_dtype) else 0
    arenas = [
        torch.nn.functional.pad(to_rows(arena, kv_dtype, keys=arena is state.key_arena), (0, 0, before, 0)).contiguous()
        for arena in state[:2]
    ]
    position = torch.nn.functional.pad(state.slot_position, (before, 0), value=-1)
    moved = state._replace(
        key_arena=arenas[0],
        value_arena=arenas[1],
        slot_position=position,
        segment_start=state.segment_start + before,
        next_slot=state.next_slot + before,
    )
    for layer in range(layers if before else 0):
        width = int(state.segment_len[:, layer].max()) + 1
        slots = (state.segment_start[:, layer, None] + torch.arange(width)).clamp(max=state.slot_position.shape[1] - 1)
        used = torch.arange(width) <= state.segment_len[:, layer, None]
        index = slots[:, None, :, None]
        key, value = (arena.gather(2, index.expand(-1, arena.shape[1], -1, arena.shape[3])) for arena in state[:2])
        position = torch.where(used, state.slot_position.gather(1, slots).long(), -1)
        write_window(moved[:3], key, value, position, sizes_of(moved.segment_start), layer=layer)
    return dataclasses.replace(case, state=moved, kv_dtype=kv_dtype)


def random_step(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    dim: int,
    layers: int = 3,
    longest: int = 150,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> StepCase:
    """Ragged segments with some room each; most of them have a hole, where the last evicted entry was."""
    random = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=random))

    def normal(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=random).to(to)

    held = torch.randint(6, longest + 1, (batch, layers), generator=random)
    room = held + 20
    start = room.cumsum(1) - room
    slots = -(-(int(room.sum(1).max()) + 1) // 16) * 16
    lengths = torch.randint(2 * longest, 2 * longest + 50, (batch,), generator=random)
    position = torch.full((batch, slots), -1, dtype=torch.int32)
    count, free, protect = held.clone(), start + held, torch.zeros_like(held)
    for sample in range(batch):
        for layer in range(layers):
            first, entries = int(start[sample, layer]), int(held[sample, layer])
            kept = torch.randperm(int(lengths[sample]), generator=random)[:entries]
            position[sample, first : first + entries] = kept.int()
            protect[sample, layer] = kept.sort().values[-integer(1, 4)]
            hole = integer(0, entries)
            if integer(0, 3) and kept[hole] < protect[sample, layer]:
                position[sample, first + hole] = -1
                count[sample, layer] -= 1
                free[sample, layer] = first + hole
    state = CompactState(
        normal(batch, kv_heads, slots, dim),
        normal(batch, kv_heads, slots, dim),
        position,
        start,
        count,
        free,
        protect,
        torch.rand(batch, layers, generator=random) * 0.5,
        lengths,
    )
    # Not contiguous, as a model's are: [B, 1, H, D] transposed.
    query = normal(batch, 1, kv_heads * group, dim, to=query_dtype or dtype).transpose(1, 2)
    new = (normal(batch, 1, kv_heads, dim, to=query_dtype or dtype).transpose(1, 2) for _ in range(2))
    return StepCase(query, *new, state, integer(0, layers), dim**-0.5)
