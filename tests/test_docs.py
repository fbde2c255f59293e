"""The generated page of passes is the one that the docstrings give."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_passes_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_passes", ROOT / "docs" / "make_passes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "passes.md").read_text(encoding="utf-8") == module.render(), "run `make docs`"
