"""Writes docs/passes.md from the docstrings of the passes. `make docs` runs it; a test fails where it is out of date."""

import importlib
import inspect
import sys
from pathlib import Path

from tgvkv_compile.export.rewritten import STEPS as EXPORT_STEPS
from tgvkv_compile.pipeline import STEPS

FINDERS = (
    "read_merges",
    "find_appends",
    "find_enclosed",
    "find_attention",
    "find_modality",
    "find_embedding",
    "find_tensor_parallel",
    "plan_graph",
)
HEAD = """# The passes

Generated from the docstrings by `make docs`. Finders change nothing and run first; the planner decides what a graph is;
then the steps below run in this order, each only on the kinds of graph named with it. After each of them the graph is
verified: dead code gone, linted, recompiled, metadata present.

Legend: `B` batch, `H` query heads, `Hkv` key/value heads, `N` prompt, `Q` queries of this call, `S` sequence, `D` head dim,
`L` layers, `T` arena slots.
"""

EXPORTED = """# The passes of exported graphs

They run on what `torch.export` traced (`tgvkv_compile/export/rewritten.py`), behind the same finders and planner.
"""


def section(name: str, title: str) -> str:
    """One pass: its title, its file and the docstring of the function of the same name."""
    module = importlib.import_module(f"tgvkv_compile.passes.{name}")
    text = inspect.getdoc(getattr(module, name)) or ""
    return f"## {title}\n\n`tgvkv_compile/passes/{name}.py`\n\n{_markdown(text)}\n"


def _markdown(text: str) -> str:
    """Turns `::` blocks into fenced ones and leaves the rest as it is."""
    lines, fenced = [], False
    for line in text.splitlines():
        if fenced and line and not line.startswith("    "):
            while lines and not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            fenced = False
        if line.endswith("::"):
            lines += [line[:-1], "", "```text"]
            fenced = True
            continue
        if fenced and not line and lines[-1] == "```text":
            continue
        lines.append(line.removeprefix("    ") if fenced else line)
    if fenced:
        lines.append("```")
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [section(name, name) for name in FINDERS]
    parts.append(section("extract_vision_count", "extract_vision_count (a copy of a prefill, before it is rewritten)"))
    for step in STEPS:
        parts.append(section(step.name, f"{step.name} ({', '.join(sorted(step.kinds))})"))
    parts.append(EXPORTED)
    parts += [section(name, f"{name} (exported graphs)") for name in ("drop_assertions", "find_additions")]
    for kind, steps in EXPORT_STEPS.items():
        parts += [section(name, f"{name} (exported {kind})") for name, _ in steps]
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(__file__).parent / "passes.md"
    target.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")
