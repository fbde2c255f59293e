"""How long the first two answers take at several depths, as ratios, and the goals that those are held against."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bench import table
from bench.processes import WARM

OURS, FULL = "tgvkv", "inductor-full"
SHALLOW, DEEP = 4, 24
TIMES = ("ready_s", "first_s", "second_s")


@dataclasses.dataclass(frozen=True)
class Goal:
    """A first answer's time over another one's, and the most that it should be.

    Attributes:
        name: Of a contender.
        layers: Its depth.
        base: Name of the contender that it is compared with.
        base_layers: That one's depth.
        most: What the ratio should not exceed.
    """

    name: str
    layers: int
    base: str
    base_layers: int
    most: float


GOALS = (
    Goal(OURS, DEEP, OURS, SHALLOW, 1.5),
    Goal(OURS, 8, FULL, 8, 0.6),
    Goal(OURS, DEEP, FULL, DEEP, 0.6),
    Goal(f"{OURS}{WARM}", 8, f"{FULL}{WARM}", 8, 0.7),
    Goal(f"{OURS}{WARM}", DEEP, f"{FULL}{WARM}", DEEP, 0.7),
)


def goals(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of the goals whose two sides were measured, with the ratio that was found."""
    rows = {(name, point["layers"]): row for point in points for name, row in point["rows"].items()}
    found = []
    for goal in GOALS:
        ours, theirs = rows.get((goal.name, goal.layers)), rows.get((goal.base, goal.base_layers))
        if ours is not None and theirs is not None:
            ratio = ours["first_s"] / theirs["first_s"]
            found.append({**dataclasses.asdict(goal), "ratio": ratio, "met": ratio <= goal.most})
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Seconds, ratios of ours to torch.compile by depth, of the deepest to the shallowest, and the goals."""
    points = found["first"]
    seconds = [
        [
            str(point["layers"]),
            name,
            *(format(row[key], ".2f") for key in ("ready_s", "first_s", "second_s")),
            str(row["graphs"]),
        ]
        for point in points
        for name, row in point["rows"].items()
    ]
    parts = [table.markdown(["", "", "loaded s", "first answer s", "second s", "graphs"], seconds), ""]
    ratios = [*_against_full(points), *_by_depth(points)]
    if ratios:
        parts += [table.markdown(["", "first answer", "second"], ratios), ""]
    if found["goals"]:
        parts += [table.markdown(["first answer", "ratio", "goal", ""], [_goal(goal) for goal in found["goals"]]), ""]
    return "\n".join(parts).rstrip()


def _against_full(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = []
    for point in points:
        for suffix in ("", WARM):
            ours, theirs = point["rows"].get(f"{OURS}{suffix}"), point["rows"].get(f"{FULL}{suffix}")
            if ours is not None and theirs is not None:
                lines.append([f"{OURS}{suffix} / {FULL}{suffix}, {point['layers']} layers", *_ratios(ours, theirs)])
    return lines


def _by_depth(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of the deepest to the shallowest."""
    ordered = sorted(points, key=lambda point: point["layers"])
    low, high = ordered[0], ordered[-1]
    if low is high:
        return []
    return [
        [f"{name}, {high['layers']} layers / {low['layers']} layers", *_ratios(row, low["rows"][name])]
        for name, row in high["rows"].items()
    ]


def _ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [format(ours[key] / theirs[key], ".2f") for key in ("first_s", "second_s")]


def _goal(goal: Mapping[str, Any]) -> list[str]:
    what = f"{goal['name']} at {goal['layers']} layers / {goal['base']} at {goal['base_layers']}"
    return [what, format(goal["ratio"], ".2f"), f"<= {goal['most']:g}", "met" if goal["met"] else "not met"]
