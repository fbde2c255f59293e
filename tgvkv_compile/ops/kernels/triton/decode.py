"""Launches the kernels of a decode step: `tgvkv::decode_step` on CUDA."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.config import KVDtype
from tgvkv_compile.errors import InternalError
from tgvkv_compile.ops.kernels import DECODE_MODES
from tgvkv_compile.ops.kernels.triton.decode_kernels import attend_split, finish_step
from tgvkv_compile.ops.kernels.triton.quantised_kernels import attend_rows
from tgvkv_compile.ops.state import CompactState

_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_MAX_DIM = 256
_SMALLEST_PRODUCT = 16  # rows that `tl.dot` takes at least
_FINISH_BLOCK = 128
MOST_REGISTERS = 255
"""Of a thread. Said to the assembler, which else spills to fit more programs onto a multiprocessor (seen with Triton 3.6)."""


def next_power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class DecodeLaunch:
    """How a step of these shapes is launched; lengths play no part.

    Attributes:
        dim: D, padded to a power of two.
        group: Rows of query heads per program.
        block: Entries that `attend_split` looks at together.
        splits: Parts that a segment is looked at in, at most.
        programs: Programs per sample in `finish_step`.
        heads: Heads that they look at together.
        warps: Of `attend_split`.
    """

    dim: int
    group: int
    block: int
    splits: int
    programs: int
    heads: int
    warps: int


def decode_launch(query: Tensor, state: CompactState, processors: int) -> DecodeLaunch:
    """The launch of a step on a device with so many multiprocessors.

    There are about four programs per multiprocessor: what one waits for, the others hide.
    """
    batch, heads, _, dim = query.shape
    kv_heads, slots, held = *state.key_arena.shape[1:3], state.key_arena.dtype
    padded = max(64, next_power(dim))
    group = heads // kv_heads
    rows = 1 if group == 1 else max(_SMALLEST_PRODUCT, next_power(group))
    codes = held == torch.uint8
    size = 2 if codes else held.itemsize  # of what is multiplied: codes are, as bfloat16
    # Tensor cores take 16 KiB of keys at a time. Without them a program's registers hold what it works on: half as much. So
    # they do with codes, which are unpacked there.
    tile = 16384 if size == 2 and group > 1 and not codes else 8192
    block = max(16, min(64, tile // (padded * size)))
    wanted = next_power(-(-4 * processors // (batch * kv_heads)))
    splits = max(1, min(64, wanted, next_power(-(-slots // block))))
    programs = max(1, min(64, max(8, next_power(-(-2 * processors // batch))), next_power(-(-slots // _FINISH_BLOCK))))
    narrow = group == 1 or (query.dtype if codes else held).itemsize == 2
    return DecodeLaunch(padded, rows, block, splits, programs, min(16, next_power(heads)), 4 if narrow else 8)


def fused_applies(query: Tensor, state: CompactState, kv_dtype: KVDtype | None = None) -> bool:
    """Whether the kernels are made for these dtypes and this head dim.

    float64 and huge heads go the plain way, and rows whose codes and scales do not begin at multiples of four bytes.
    """
    arenas, dim = (state.key_arena, state.value_arena), query.shape[3]
    if query.dtype not in _DTYPES or dim > _MAX_DIM:
        return False
    if kv_dtype is None:
        return {arena.dtype for arena in arenas} <= _DTYPES
    return dim % 4 == 0 and all(arena.shape[3] % 4 == 0 for arena in arenas)


def fused_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompactState,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
    kv_dtype: KVDtype | None = None,
) -> Tensor:
    """One decode step of one layer in two launches, without reading anything on the host.

    Args:
        query: `[B, H, 1, D]`.
        key: `[B, Hkv, 1, D]`.
        value: `[B, Hkv, 1, D]`.
        state: The compact cache, updated in place as by the plain op.
        layer: Which segment.
        scale: What `q @ k` is multiplied by.
        decode: `"ratio"`, `"fixed"` or `"keep"`.
        sink_tokens: How many first positions are never evicted.
        kv_dtype: How the arenas hold keys and values, see `EvictionConfig`.

    Returns:
        The attention output `[B, H, 1, D]`, contiguous, dtype of `query`.

    Raises:
        InternalError: A tensor of the state is not contiguous.
    """
    for name, tensor in zip(CompactState._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise InternalError(f"{name} of a compact cache must be contiguous, its strides are {tensor.stride()}")
    batch, heads, _, dim = query.shape
    kv_heads, slots, row = state.key_arena.shape[1:]
    layers = state.segment_start.shape[1]
    launch = decode_launch(query, state, processors(query.device))
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty((batch, heads, 1, dim), dtype=query.dtype, device=query.device)

    def scratch(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=query.device)

    chooses = decode != "keep"
    top, total = scratch(batch, heads, launch.splits), scratch(batch, heads, launch.splits)
    out = scratch(batch, heads, launch.splits, dim)
    logits = scratch(batch, heads, slots) if chooses else top
    arrived = scratch(batch, dtype=torch.int32)
    tensors = (query, key, value, *state[: state._fields.index("protect_from")], top, total, out, logits, arrived)
    strides = (stride for tensor in (query, key, value) for stride in tensor.stride()[:2])
    numbers = (layer, scale, *strides, kv_heads, heads // kv_heads, slots, layers, launch.splits)
    shared: dict[str, Any] = {
        "D": dim,
        "DIM": launch.dim,
        "GROUP": launch.group,
        "BLOCK": launch.block,
        "STORE_LOGITS": chooses,
        "num_warps": launch.warps,
        "num_stages": 2,
        "maxnreg": MOST_REGISTERS,
    }
    if kv_dtype is None:
        alike = query.dtype == state.key_arena.dtype == state.value_arena.dtype
        attend_split[batch * kv_heads, launch.splits](
            *tensors, *numbers, WIDE=not alike or query.dtype == torch.float32, **shared
        )
    else:
        parts = 3 if query.dtype == torch.float32 else 2
        attend_rows[batch * kv_heads, launch.splits + 1](
            *tensors, *numbers, state.lengths, ROW=row, PARTS=parts, KIND=kv_dtype, **shared
        )
    finish_step[(batch, launch.programs)](
        top,
        total,
        out,
        logits,
        arrived,
        scratch(batch, 2, launch.programs),
        scratch(batch, 5, launch.programs, dtype=torch.int32),
        output,
        state.slot_position,
        state.segment_start,
        state.segment_len,
        state.next_slot,
        state.protect_from,
        state.keep_rate,
        state.lengths,
        layer,
        sink_tokens,
        heads,
        slots,
        layers,
        launch.splits,
        D=dim,
        DIM=launch.dim,
        BLOCK=_FINISH_BLOCK,
        HEADS=launch.heads,
        SPLITS=launch.splits,
        PROGRAMS=launch.programs,
        DECODE=DECODE_MODES[decode],
        num_warps=4,
        maxnreg=128,  # else the assembler spills to fit more programs onto a multiprocessor than there are
        # `length - total * rate` must round twice, as the plain op and the recorded cases do.
        enable_fp_fusion=False,
    )
    return output


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; on the CPU, where only the interpreter runs the kernels, those of an H100."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
