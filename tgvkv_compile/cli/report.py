"""What is printed: cache reports, budgets, sizes, versions and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tgvkv_compile import __version__
from tgvkv_compile.backend.explanation import size
from tgvkv_compile.runtime.inspect import CacheReport


def cache_lines(report: CacheReport, sample: int = 0) -> list[str]:
    """A cache report as lines of text; the kept entries are those of one sample."""
    lengths = report.segment_lengths[sample].tolist()
    share = report.physical_bytes / report.logical_bytes
    lines = [
        f"KV cache: {report.num_layers} layers, logical length {report.logical_length}",
        f"  kept per layer: {' '.join(str(length) for length in lengths)}",
        f"  bytes: {size(report.physical_bytes)} of {size(report.logical_bytes)} ({share:.1%})",
    ]
    if report.ranking is not None:
        lines.append(f"  policy: ranking {report.ranking}, budgeting {report.budgeting}")
    if report.reserve_bytes:
        lines.append(f"  of which free for growth: {size(report.reserve_bytes)}")
    if not report.compressed:
        lines.append("  not compressed: the prompt has no picture, or the model was not rewritten")
    return lines


def budget_label(budget: float | int | None) -> str:
    """`20 %`, `64 tokens`, or `full` where there is none."""
    if budget is None:
        return "full"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g} %"


def versions() -> dict[str, str]:
    """Releases that results depend on."""
    return {
        "tgvkv-compile": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """The machine that results were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown"
