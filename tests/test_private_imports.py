"""Private parts of torch are imported by one file, which says what for; everybody else asks that file."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tgvkv_compile"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "private.py")


def private(name: str) -> bool:
    """Whether a dotted name of torch's has a private module in it; operators (`torch.ops`) and methods are none."""
    first, *parts = name.split(".")
    if first != "torch" or parts[:1] == ["ops"]:
        return False
    modules = itertools.takewhile(lambda part: not part[0].isupper(), parts)
    return parts[:2] == ["fx", "experimental"] or any(re.match("_[^_]", part) for part in modules)


def used(source: str) -> Iterator[str]:
    """The dotted names that a file imports, or spells out from `torch` on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(parts)])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_else_imports_private_parts_of_torch(path: Path) -> None:
    assert [name for name in used(path.read_text(encoding="utf-8")) if private(name)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch._inductor.utils as utils",
        "from torch import _inductor",
        "from torch._guards import tracing",
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv",
        "import torch\nprint(torch._C._nn.linear)",
    ],
)
def test_private_parts_are_seen(source: str) -> None:
    assert any(private(name) for name in used(source))


@pytest.mark.parametrize(
    "source", ["torch.__version__", "torch.ops._c10d_functional.wait_tensor", "torch.Tensor._make_subclass"]
)
def test_public_parts_are_free(source: str) -> None:
    assert not any(private(name) for name in used(source))
