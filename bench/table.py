"""Rows of a run as text."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "compile s": ("compile_s", 1.0, ".1f"),
    "prefill ms": ("prefill_ms", 1.0, ".1f"),
    "decode ms": ("decode_ms", 1.0, ".2f"),
    "tokens/s": ("tokens_per_s", 1.0, ".1f"),
    "KV MiB": ("kv_bytes", 2.0**20, ".1f"),
    "prefill peak MiB": ("prefill_peak_bytes", 2.0**20, ".1f"),
    "decode peak MiB": ("decode_peak_bytes", 2.0**20, ".1f"),
}
"""Of a table: the key of a row, the unit it is shown in, the form of the number."""


def of_rows(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A markdown table of a run's medians."""
    return markdown(["", *COLUMNS], [[name, *cells(row)] for name, row in rows.items()])


def of_run(rows: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, float]) -> str:
    """The table of a run's medians, and what they are worth beside each other."""
    return "\n".join([of_rows(rows), "", *(f"{key:26s} {value:.3f}" for key, value in ratios.items())])


def cells(row: Mapping[str, Any]) -> list[str]:
    """One text per column; empty where a row has no such thing."""
    values = [(row.get(key), unit, form) for key, unit, form in COLUMNS.values()]
    return ["" if value is None else format(value / unit, form) for value, unit, form in values]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, all others to the right."""
    widths = [max(len(line[index]) for line in (head, *lines)) for index in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(line: Sequence[str]) -> str:
        aligned = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    return "\n".join([row(head), row(rule), *(row(line) for line in lines)])
