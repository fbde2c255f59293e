"""Pages of the site that lie outside of `docs/`, and links that hold in the repository and in the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "AGENTS.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "bench.md",
}
"""Pages by where they lie in the repository, and where in the site."""
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|/")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages from outside."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    target = page.file.src_uri
    source = next((name for name, place in OUTSIDE.items() if place == target), f"docs/{target}")

    def moved(link: re.Match[str]) -> str:
        opening, to, anchor, closing = link.groups()
        if ELSEWHERE.match(to):
            return link.group()
        place = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), to)))
        return f"{opening}{posixpath.relpath(place, posixpath.dirname(target) or '.')}{anchor or ''}{closing}"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else LINK.sub(moved, part) for index, part in enumerate(parts))


def page_of(path: str) -> str:
    """Where a file of the repository is in the site; a folder is its README."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return OUTSIDE.get(path, path.removeprefix("docs/"))
