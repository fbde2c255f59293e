"""Writes docs/passes.md from the docstrings of the passes. `make docs` runs it; a test fails where it is out of date."""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import tgvkv_compile
from tgvkv_compile.export.trace.rewritten import STEPS as EXPORT_STEPS
from tgvkv_compile.pipeline import STEPS
from tgvkv_compile.plan import GraphKind
from tgvkv_compile.runner import Step

FIRST = (
    "read_merges",
    "find_appends",
    "find_enclosed",
    "find_attention",
    "find_modality",
    "find_embedding",
    "find_tensor_parallel",
    "plan_graph",
)
SECTIONS = {"Args:": "Arguments", "Raises:": "Raises", "Returns:": "Returns"}
HEAD = """# The passes

Generated from the docstrings by `make docs`. `read_merges` runs first, then the finders, which change nothing; the planner
decides what a graph is; then what the table lists for that kind of graph runs, in order. After each pass the graph is
verified: dead code gone, linted, recompiled, metadata present.

Legend: `B` batch, `H` query heads, `Hkv` key/value heads, `N` prompt, `Q` queries of this call, `S` sequence, `D` head dim,
`L` layers, `T` arena slots.
"""

EXPORTED = """# The passes of exported graphs

They run on what `torch.export` traced (`tgvkv_compile/export/trace/rewritten.py`), behind the same finders and planner.
"""


def section(name: str, title: str) -> str:
    """One pass: its title, its file and the docstring of the function of the same name."""
    package = Path(tgvkv_compile.__path__[0])
    (file,) = (path.relative_to(package.parent) for path in package.glob(f"passes/**/{name}.py"))
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    text = inspect.getdoc(getattr(module, name)) or ""
    return f"## {title}\n\n`{file.as_posix()}`\n\n{_markdown(text)}\n"


def _markdown(text: str) -> str:
    """Turns `::` blocks into fenced ones, sections into paragraphs and lists, and leaves the rest as it is."""
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
    return "\n".join(_sections(lines))


def _sections(lines: list[str]) -> Iterator[str]:
    """Turns `Args:` and `Raises:` into lists, `Returns:` into a paragraph."""
    section = None
    for line in lines:
        if line in SECTIONS:
            section = line
            yield f"**{SECTIONS[line]}**"
            yield ""
            continue
        if line and not line.startswith("    "):
            section = None
        if section is None or not line:
            yield line
        elif section == "Returns:":
            yield line.removeprefix("    ")
        elif line.startswith("     "):
            yield f"  {line.strip()}"
        else:
            name, _, said = line.strip().partition(": ")
            yield f"- `{name}`: {said}"


def _kinds(steps: Mapping[GraphKind, tuple[Step, ...]]) -> dict[str, list[str]]:
    """Of each pass, in the order of the lists, the kinds of graph it is for."""
    found: dict[str, list[str]] = {}
    for kind, listed in steps.items():
        for step in listed:
            found.setdefault(step.name, []).append(kind)
    return found


def _table(steps: Mapping[GraphKind, tuple[Step, ...]]) -> str:
    """Which passes each kind of graph goes through."""
    rows = [f"| `{kind}` | {', '.join(f'`{step.name}`' for step in listed)} |" for kind, listed in steps.items()]
    return "\n".join(["| kind of graph | passes |", "| --- | --- |", *rows, ""])


def render() -> str:
    """The whole page."""
    parts = [HEAD, _table(STEPS)]
    parts += [section(name, name) for name in FIRST]
    parts.append(section("extract_vision_count", "extract_vision_count (a copy of a prefill, before it is rewritten)"))
    for name, kinds in _kinds(STEPS).items():
        parts.append(section(name, f"{name} ({', '.join(kinds)})"))
    parts += [EXPORTED, _table(EXPORT_STEPS)]
    parts += [section(name, f"{name} (exported graphs)") for name in ("drop_assertions", "find_additions")]
    for name, kinds in _kinds(EXPORT_STEPS).items():
        parts.append(section(name, f"{name} (exported {', '.join(kinds)})"))
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(__file__).parent / "passes.md"
    target.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")
