"""Pages are the ones that docstrings and records give, links lead somewhere, and README's lines run."""

import importlib.util
import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.families.table import FAMILIES
from tgvkv_compile import passes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = {"README.md", "AGENTS.md", "CHANGELOG.md", "bench/README.md"}
"""Pages of the site that do not lie in `docs/`; `docs/site/hooks.py` brings them in."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(name: str) -> Any:
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["passes", "models"])
def test_a_generated_page_is_up_to_date(page: str) -> None:
    module = module_at(DOCS / f"make_{page}.py")
    assert (DOCS / f"{page}.md").read_text(encoding="utf-8") == module.render(), f"run `python docs/make_{page}.py`"


def test_every_pass_is_listed_where_they_are_and_in_the_docs() -> None:
    shared = {"__init__", "told"}
    folder = Path(passes.__path__[0])
    files = [path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py") if path.stem not in shared]
    every = {name for *of, name in files if hasattr(importlib.import_module(".".join([passes.__name__, *of, name])), name)}
    assert {"plan_graph", "insert_decode"} <= every and not {"rewrite", "inserted"} & every
    listed = re.findall(r"`(\w+)`", (passes.__doc__ or "").partition("What passes share")[0])
    assert sorted(listed) == sorted(every)
    titles = re.findall(r"^## (\w+)", (DOCS / "passes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(titles) == sorted(every)


def test_every_family_of_the_table_is_in_the_record() -> None:
    families = record("models.json")["families"]
    assert set(families) == set(FAMILIES)
    for name, entry in families.items():
        assert not entry["video"] or "video" in FAMILIES[name].media


# Pages and links


def pages() -> list[str]:
    """All pages, by where they lie in the repository."""
    return sorted(OUTSIDE | {str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md")})


def text_of(page: str) -> str:
    """Without code."""
    return FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_site_s_nav_names_every_page_once() -> None:
    def named(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from named(value) if isinstance(value, list) else [value]

    nav = list(named(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    hooks = (DOCS / "site" / "hooks.py").read_text(encoding="utf-8")
    outside = dict(re.findall(r'^    "(\S+\.md)": "(\S+\.md)",$', hooks, re.MULTILINE))
    assert set(outside) == OUTSIDE
    inside = {page.removeprefix("docs/") for page in pages() if page not in OUTSIDE}
    assert sorted(nav) == sorted(inside | set(outside.values()))


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        to, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / to).resolve() if to else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


def test_references_in_docstrings_name_something() -> None:
    """As the site resolves them: a whole path, or a name that the module knows."""
    missing = []
    for path in (ROOT / "tgvkv_compile").rglob("*.py"):
        for name, target in re.findall(r"\[`([\w.]+)`\]\[([\w.]*)\]", path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if pydoc.locate(target or f"{module}.{name}") is None:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def test_api_pages_name_what_is_there() -> None:
    written = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md"))
    named = re.findall(r"^::: (\S+)", written, re.MULTILINE)
    assert "tgvkv_compile.tgvkv_backend" in named
    assert [name for name in named if pydoc.locate(name) is None] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    build = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", DOCS / "site" / "mkdocs.yml")
    done = subprocess.run([*build, "--site-dir", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = r'<(?:link|script|img)[^>]*(?:href|src)="?(https?://[^">\s]*)'
    assert [link for path in tmp_path.rglob("*.html") for link in re.findall(fetched, path.read_text(encoding="utf-8"))] == []


# README


def test_readme_counts_what_the_record_counts() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (families,) = re.findall(r"\*\*(\d+) model families, as tiny models with random weights, on the CPU\*\*", readme)
    assert int(families) == len(record("models.json")["families"])
    (decoders,) = re.findall(r"Of (\d+) more families", readme)
    assert int(decoders) == len(record("models.json")["decoders"])


def test_readme_s_picture_shows_the_recorded_figures() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    measured = record("benchmarks/llava-next-cpu.json")
    figure = module_at(DOCS / "make_picture.py").draw(measured)
    shown = {text.get_text() for text in figure.findobj(Text)}
    full, ours = measured["rows"]["inductor-full"], measured["rows"]["tgvkv"]
    mib = [f"{row['kv_bytes'] / 2**20:.0f}" for row in (ours, full)]
    step = [f"{row['decode_ms']:.0f}" for row in (ours, full)]
    assert {f"{value} MiB" for value in mib} | {f"{value} ms" for value in step} <= shown
    said = f"{mib[0]} MiB of KV instead of {mib[1]}, a decode step of {step[0]} ms instead of {step[1]}"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (DOCS / "what-it-does.png").stat().st_size < 200_000


@pytest.mark.slow
def test_readme_s_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model of the demonstration, without Inductor."""
    from tgvkv_compile import inspect_cache
    from tgvkv_compile.digits import held_out_questions, model_dir

    (code,) = re.findall(r"## Five lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(model_dir()))
    code = code.replace("tgvkv_backend(", 'tgvkv_backend(lowering="eager", ')
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (question,) = held_out_questions(1)
    names: dict[str, Any] = {"image": question.image, "prompt": question.prompt}
    exec(code, names)
    model, inputs, tokens = (names[name] for name in ("model", "inputs", "tokens"))
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    report = inspect_cache(model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True))
    assert report.compressed
