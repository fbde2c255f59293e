"""Two records of `bench.run` beside each other.

python -m bench.compare before.json after.json
"""

import sys
from pathlib import Path
from typing import Any

from bench import record, table
from bench.arguments import plain_parser
from bench.errors import exit_code

HEADS = ("machine", "versions", "preset", "budget", "compiler")


def main() -> None:
    """Prints a table of what both records have, and what they were not run alike in."""
    options = plain_parser(__doc__)
    options.add_argument("before", type=Path)
    options.add_argument("after", type=Path)
    args = options.parse_args()
    before, after = record.read(args.before), record.read(args.after)
    sys.stdout.write(f"{comparison(before, after)}\n")
    differing = differences(before, after)
    if differing:
        sys.stdout.write("\n".join(["", "not run alike:", *(f"- {line}" for line in differing)]) + "\n")


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A markdown table: each row's medians before and after, and the second over the first."""
    lines = []
    for name, row in before["rows"].items():
        for title, (key, unit, form) in table.COLUMNS.items():
            old, new = row.get(key), after["rows"].get(name, {}).get(key)
            if old is not None and new is not None:
                ratio = f"{new / old:.3f}" if old else ""
                lines.append([f"{name}: {title}", format(old / unit, form), format(new / unit, form), ratio])
    for key, old in before["ratios"].items():
        if key in after["ratios"]:
            new = after["ratios"][key]
            lines.append([key, f"{old:.3f}", f"{new:.3f}", f"{new / old:.3f}" if old else ""])
    return table.markdown(["", "before", "after", "after / before"], lines)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`machine.cores: 2 / 16` of all that should be the same if numbers are to be compared."""
    found = []
    for head in HEADS:
        old, new = before.get(head), after.get(head)
        if not isinstance(old, dict) or not isinstance(new, dict):
            old, new = {"": old}, {"": new}
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                found.append(f"{head}{'.' if key else ''}{key}: {old.get(key)} / {new.get(key)}")
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
