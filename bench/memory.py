"""Peak memory of a call, as torch's allocator saw it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def peak_of(call: Callable[[], Result], device: str) -> tuple[Result, int]:
    """Runs `call` and measures it.

    Args:
        call: What to run. It is slower than it would be otherwise, so it is not timed.
        device: `"cpu"` or `"cuda"`.

    Returns:
        What it returned, and the most bytes that were allocated at one time beyond those allocated before. Memory that
        a CUDA graph holds already is not among them.
    """
    return _peak_on_cuda(call) if device == "cuda" else _peak_on_cpu(call)


def _peak_on_cuda(call: Callable[[], Result]) -> tuple[Result, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Callable[[], Result]) -> tuple[Result, int]:
    """The profiler notes each allocation of torch's allocator, those of Inductor's code among them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return result, peak_of_events(events)


def peak_of_events(events: list[dict[str, Any]]) -> int:
    """The largest sum of bytes allocated and not freed, of a trace's memory events on the CPU."""
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if _is_allocation(event))
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak


def _is_allocation(event: dict[str, Any]) -> bool:
    return event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
