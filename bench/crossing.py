"""Where two lines of answers over time cross, and how far apart they are."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PAIRS = (
    ("tgvkv", "inductor-full"),
    ("tgvkv", "hf-eager"),
    ("tgvkv-warm", "inductor-full-warm"),
    ("tgvkv-warm", "hf-eager"),
    ("inductor-full", "hf-eager"),
)
"""Whose line is compared with whose."""


def pairs(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each pair that was measured: the ratios of first and last answer, and where the first's line crosses the other's."""
    found = []
    for name, base in PAIRS:
        if name in rows and base in rows:
            ours, theirs = rows[name]["answers_s"], rows[base]["answers_s"]
            found.append(
                {
                    **{"contender": name, "base": base, "first": ours[0] / theirs[0], "last": ours[-1] / theirs[-1]},
                    **{"ahead_from": ahead_from(ours, theirs), "ahead_at_pace": ahead_at_pace(ours, theirs)},
                }
            )
    return found


def ahead_from(ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """The number, from 1, of the answer from which on all of ours come no later; None where the last comes later."""
    behind = [place for place, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our > their]
    first = behind[-1] + 2 if behind else 1
    return first if first <= len(ours) else None


def ahead_at_pace(ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """The same beyond what was measured, if both go on at the pace of their second halves.

    None where the lines have crossed already, or would never, or where there is no second half.
    """
    if ahead_from(ours, theirs) is not None or len(ours) < 3:
        return None
    gained = pace(theirs) - pace(ours)
    return len(ours) + math.ceil((ours[-1] - theirs[-1]) / gained) if gained > 0 else None


def pace(answers: Sequence[float]) -> float:
    """Seconds from one answer to the next in the second half, where most has been compiled; the median of them."""
    took = [after - before for before, after in itertools.pairwise(answers)]
    return statistics.median(took[len(took) // 2 :]) if took else 0.0
