"""The decode op against the memory bandwidth that a copy reaches on the same device.

A step of one layer must read its segment's keys and values once. The share is those bytes per second, over the bytes per second
(read and written) of a copy of a large tensor; both are medians, their rounds interleaved.

    python -m bench.bandwidth --preset llava-1.5-7b-16k --batch 16 --budget 0.5 --json bandwidth.json
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import record, table
from bench.arguments import add_budget, add_files, parser, preset_of
from bench.contenders import kept_tokens
from bench.errors import exit_code
from bench.presets import Preset
from bench.requests import synchronise
from tgvkv_compile.ops.state import CompactState

ROOM = 64
"""Free slots, and entries that are never evicted."""
REPEATS = 20
WARM_UP = 5


def main() -> None:
    """Measures, prints a table, writes JSON where asked to."""
    options = parser(__doc__)
    add_budget(options, "fraction of the context that the segment holds")
    add_files(options, "json")
    args = options.parse_args()
    preset = preset_of(args)
    found = {**record.header("bench.bandwidth", args.preset, preset), "budget": args.budget}
    found |= share(preset, args.budget)
    record.write(found, args.json)
    lines = [
        ["copy", f"{found['copy_bytes_per_s'] / 1e9:.0f}", ""],
        ["decode_step", f"{found['decode_bytes_per_s'] / 1e9:.0f}", f"{found['share']:.2f}"],
    ]
    sys.stdout.write(table.markdown(["", "GB/s", "share"], lines) + "\n")


def share(preset: Preset, budget: float) -> dict[str, Any]:
    """Bytes per second of both, and the first over the second.

    Args:
        preset: Shapes, dtype, device, `context` and `batch`.
        budget: Fraction of the context that the segment holds.
    """
    kept = kept_tokens(budget, preset.context)
    new, state = step_inputs(preset, kept)
    entry = 2 * preset.batch * preset.kv_heads * preset.head_dim * getattr(torch, preset.dtype).itemsize
    source = torch.empty(max(kept * entry, 1 << 24), dtype=torch.uint8, device=preset.device)
    target = torch.empty_like(source)

    def decode() -> None:
        torch.ops.tgvkv.decode_step(*new, *state, 0, preset.head_dim**-0.5, "fixed", 4)
        state.lengths.add_(1)

    times = _interleaved([decode, lambda: target.copy_(source)], preset)
    copy, step = 2 * source.numel() / times[1], kept * entry / times[0]
    return {"kept": kept, "decode_s": times[0], "decode_bytes_per_s": step, "copy_bytes_per_s": copy, "share": step / copy}


def step_inputs(preset: Preset, kept: int) -> tuple[list[Tensor], CompactState]:
    """A new token's `query`, `key` and `value`, and a compact state of one layer whose segment holds `kept` entries."""
    where: dict[str, Any] = {"dtype": getattr(torch, preset.dtype), "device": preset.device}
    batch, device = preset.batch, preset.device
    arena = (batch, preset.kv_heads, kept + ROOM, preset.head_dim)
    position = torch.full((batch, kept + ROOM), -1, dtype=torch.int32, device=device)
    position[:, :kept] = torch.arange(kept, dtype=torch.int32, device=device)

    def column(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((batch, 1), value, dtype=dtype, device=device)

    state = CompactState(
        torch.randn(arena, **where),
        torch.randn(arena, **where),
        position,
        column(0),
        column(kept),
        column(kept),
        column(max(0, kept - ROOM)),
        column(0.5, torch.float32),
        torch.full((batch,), kept, device=device),
    )
    new = [torch.randn(batch, heads, 1, preset.head_dim, **where) for heads in (preset.heads, *[preset.kv_heads] * 2)]
    return new, state


def _interleaved(calls: list[Callable[[], Any]], preset: Preset) -> list[float]:
    """Median seconds of each call, over rounds in which each has its turn of `REPEATS` calls."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(WARM_UP + preset.rounds):
        for call, taken in zip(calls, times, strict=True):
            synchronise(preset.device)
            begun = time.perf_counter()
            for _ in range(REPEATS):
                call()
            synchronise(preset.device)
            if number >= WARM_UP:
                taken.append((time.perf_counter() - begun) / REPEATS)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    sys.exit(exit_code(main))
