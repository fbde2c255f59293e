"""Peak memory, as torch's allocator saw it."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class Watch:
    """The most that is allocated at a time in the named parts of what runs within it, beyond what was there before.

    On the CPU torch's profiler notes each allocation, those of Inductor's code among them; on CUDA the allocator keeps
    count by itself. Memory that a CUDA graph or a cache had before is not counted.

        with Watch("cpu") as watch, watch.part("prefill"):
            ...
        watch.peaks["prefill"]

    Attributes:
        peaks: Bytes, per part. There when it is over.
    """

    def __init__(self, device: str) -> None:
        """Nothing is watched yet.

        Args:
            device: `"cpu"` or `"cuda"`.
        """
        self.peaks: dict[str, int] = {}
        self._parts: list[str] = []
        self._before = 0
        self._profile: torch.profiler.profile | None = None
        if device == "cpu":
            cpu = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True)

    def __enter__(self) -> "Watch":
        if self._profile is not None:
            self._profile.__enter__()
        else:
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(*error)
        if error[0] is None:
            self.peaks = peaks_of_events(_events(self._profile), self._parts)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within is the part of this name."""
        self._parts.append(name)
        if self._profile is not None:
            with torch.profiler.record_function(name):
                yield
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self.peaks[name] = torch.cuda.max_memory_allocated() - self._before


def peaks_of_events(events: Sequence[dict[str, Any]], parts: Sequence[str]) -> dict[str, int]:
    """The largest sum of bytes allocated and not freed since the start, within each part of a trace of the CPU."""
    begins = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") in parts}
    changes = sorted(((event["ts"], event["args"]["Bytes"]) for event in events if _is_allocation(event)), key=_time)
    peaks = dict.fromkeys(parts, 0)
    live = 0
    for at, size in changes:
        before, live = live, live + size
        for name, (begin, end) in begins.items():
            if begin <= at <= end:
                peaks[name] = max(peaks[name], before, live)
    return peaks


def _events(profile: torch.profiler.profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _is_allocation(event: dict[str, Any]) -> bool:
    return event.get("name") == "[memory]" and event["args"].get("Device Type") == 0


def _time(change: tuple[float, int]) -> float:
    return change[0]
