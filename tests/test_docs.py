"""The generated pages are the ones that the docstrings, and the record of the families, give."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.families.table import FAMILIES
from tgvkv_compile import passes

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["passes", "models"])
def test_a_generated_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location(f"make_{page}", DOCS / f"make_{page}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / f"{page}.md").read_text(encoding="utf-8") == module.render(), f"run `python docs/make_{page}.py`"


def test_every_pass_is_listed_where_they_are_and_in_the_docs() -> None:
    shared = {"__init__", "told"}
    files = [path.stem for path in Path(passes.__path__[0]).glob("*.py") if path.stem not in shared]
    every = {name for name in files if hasattr(importlib.import_module(f"{passes.__name__}.{name}"), name)}
    assert {"plan_graph", "insert_decode"} <= every and not {"rewrite", "inserted"} & every
    listed = re.findall(r"`(\w+)`", (passes.__doc__ or "").partition("What passes share")[0])
    assert sorted(listed) == sorted(every)
    titles = re.findall(r"^## (\w+)", (DOCS / "passes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(titles) == sorted(every)


def test_every_family_of_the_table_is_in_the_record() -> None:
    record = json.loads((DOCS / "models.json").read_text(encoding="utf-8"))["families"]
    assert set(record) == set(FAMILIES)
    for name, entry in record.items():
        assert not entry["video"] or "video" in FAMILIES[name].media
