"""What a run is written down as."""

import dataclasses
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import tgvkv_compile
from bench.errors import BenchError
from bench.presets import Preset

SCHEMA = 1
"""Raised when a key changes its meaning."""


def header(module: str, name: str, preset: Preset | None) -> dict[str, Any]:
    """What a number belongs to: command, date, versions, machine, the preset's name, and the preset as it was run."""
    return {
        "schema": SCHEMA,
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
        **({} if preset is None else {"preset": dataclasses.asdict(preset)}),
        "preset_name": name,
    }


def write(record: dict[str, Any], path: Path | None) -> None:
    """Writes JSON; nothing where no file was asked for."""
    write_text(json.dumps(record, indent=1), path)


def write_text(text: str, path: Path | None) -> None:
    """Writes a text, and the folder that it goes into; nothing where no file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")


def read(path: Path, holding: tuple[str, ...] = ("rows",), of: str = "bench.run") -> dict[str, Any]:
    """Reads what a run has written.

    Args:
        path: The file.
        holding: Keys of which it has one at least.
        of: What writes such records.

    Raises:
        BenchError: There is no such file, or it is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.keys().isdisjoint(holding):
        raise BenchError(f"{path}: not a record of {of} (schema {SCHEMA}); measure it again")
    return record


def _versions() -> dict[str, str | None]:
    return {
        "tgvkv_compile": tgvkv_compile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            **{"name": found.name, "memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"},
            "processors": found.multi_processor_count,
        }
    return machine


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
