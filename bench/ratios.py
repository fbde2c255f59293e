"""What the rows of a run are worth beside each other."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MEASURES = {"decode": "decode_ms", "prefill": "prefill_ms", "compile": "compile_s", "kv_bytes": "kv_bytes"}
BASES = {
    "full": "inductor-full",
    "static": "inductor-static",
    "eager": "hf-eager",
    "floor": "floor",
    "floor_static": "floor-static",
}
NEEDED = ("decode_vs_full", "decode_vs_floor", "prefill_vs_full", "compile_vs_full", "kv_bytes_vs_full")


def ratios(rows: Mapping[str, Mapping[str, Any]], of: str = "tgvkv") -> dict[str, float]:
    """Of one row's medians to those of the others: `<measure>_vs_<base>`, and `throughput_vs_<base>`.

    Args:
        rows: Per contender, its medians; None for what it does not have.
        of: Which row is compared.

    Returns:
        The ratios whose two numbers there are. Below 1 is better, but for throughput.
    """
    found: dict[str, float] = {}
    for measure, key in {**MEASURES, "throughput": "tokens_per_s"}.items():
        for base, name in BASES.items():
            ours, theirs = rows.get(of, {}).get(key), rows.get(name, {}).get(key)
            if ours is not None and theirs:
                found[f"{measure}_vs_{base}"] = ours / theirs
    return found


def among_ours(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Of the variants' medians to those of `tgvkv`: `<variant>_<measure>_vs_tgvkv`. Below 1 is better."""
    plain = rows.get("tgvkv", {})
    return {
        f"{name.removeprefix('tgvkv-')}_{measure}_vs_tgvkv": row[key] / plain[key]
        for name, row in rows.items()
        for measure, key in MEASURES.items()
        if name.startswith("tgvkv-") and row.get(key) is not None and plain.get(key)
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most and quartiles."""
    ordered = sorted(values)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        **{"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]},
        **{"first_quartile": low, "third_quartile": high},
    }
