"""Launches the kernels of a decode step: `tgvkv::decode_step` on CUDA."""

import dataclasses

import torch
from torch import Tensor

from tgvkv_compile.errors import InternalError
from tgvkv_compile.ops.kernels import DECODE_MODES
from tgvkv_compile.ops.kernels.triton.decode_kernels import attend_split, finish_step
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


def decode_launch(
    batch: int, heads: int, kv_heads: int, slots: int, dim: int, dtype: torch.dtype, processors: int
) -> DecodeLaunch:
    """The launch of a step on a device with so many multiprocessors.

    There are about four programs per multiprocessor: what one waits for, the others hide.
    """
    padded = max(64, next_power(dim))
    group = heads // kv_heads
    rows = 1 if group == 1 else max(_SMALLEST_PRODUCT, next_power(group))
    halves = dtype.itemsize == 2
    # Tensor cores take 16 KiB of keys at a time. Without them a program's registers hold what it works on: half as much.
    tile = 16384 if halves and group > 1 else 8192
    block = max(16, min(64, tile // (padded * dtype.itemsize)))
    wanted = next_power(-(-4 * processors // (batch * kv_heads)))
    splits = max(1, min(64, wanted, next_power(-(-slots // block))))
    programs = max(1, min(64, max(8, next_power(-(-2 * processors // batch))), next_power(-(-slots // _FINISH_BLOCK))))
    return DecodeLaunch(padded, rows, block, splits, programs, min(16, next_power(heads)), 4 if halves or group == 1 else 8)


def fused_applies(query: Tensor, state: CompactState) -> bool:
    """Whether the kernels are made for these dtypes and this head dim (float64 and huge heads go the plain way)."""
    return {query.dtype, state.key_arena.dtype, state.value_arena.dtype} <= _DTYPES and query.shape[3] <= _MAX_DIM


def fused_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompactState,
    layer: int,
    scale: float,
    decode: str,
    sink_tokens: int,
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

    Returns:
        The attention output `[B, H, 1, D]`, contiguous, dtype of `query`.

    Raises:
        InternalError: A tensor of the state is not contiguous.
    """
    for name, tensor in zip(CompactState._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise InternalError(f"{name} of a compact cache must be contiguous, its strides are {tensor.stride()}")
    batch, heads, _, dim = query.shape
    kv_heads, slots = state.key_arena.shape[1:3]
    layers = state.segment_start.shape[1]
    launch = decode_launch(batch, heads, kv_heads, slots, dim, state.key_arena.dtype, processors(query.device))
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty((batch, heads, 1, dim), dtype=query.dtype, device=query.device)

    def scratch(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=query.device)

    alike = query.dtype == state.key_arena.dtype == state.value_arena.dtype
    wide = not alike or query.dtype == torch.float32
    chooses = decode != "keep"
    top, total = scratch(batch, heads, launch.splits), scratch(batch, heads, launch.splits)
    out = scratch(batch, heads, launch.splits, dim)
    logits = scratch(batch, heads, slots) if chooses else top
    arrived = scratch(batch, dtype=torch.int32)
    attend_split[(batch * kv_heads, launch.splits)](
        query,
        key,
        value,
        state.key_arena,
        state.value_arena,
        state.slot_position,
        state.segment_start,
        state.segment_len,
        state.next_slot,
        top,
        total,
        out,
        logits,
        arrived,
        layer,
        scale,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_heads,
        heads // kv_heads,
        slots,
        layers,
        launch.splits,
        D=dim,
        DIM=launch.dim,
        GROUP=launch.group,
        BLOCK=launch.block,
        WIDE=wide,
        STORE_LOGITS=chooses,
        num_warps=launch.warps,
        num_stages=2,
        maxnreg=MOST_REGISTERS,
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
