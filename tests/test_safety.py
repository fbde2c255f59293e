"""Nothing in the package unpickles, evaluates text as code, or lets a model's repository run code unasked."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tgvkv_compile"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTING = {"eval", "exec", "__import__"}
LOADING = {"torch.load", "torch.save", "numpy.load", "np.load", "torch.jit.load", "runpy.run_path", "runpy.run_module"}
DATA = {".json", ".safetensors", ".md", ".py", ".typed"}
SOURCES_IN_CPP = PACKAGE / "ops" / "kernels" / "cpu"
"""The one folder whose files a compiler is given (`.cpp`, `.h`)."""


def problems(source: str) -> Iterator[str]:
    """What a source must not hold, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"{line}: imports {name}" for name in names if name.split(".")[0] in PICKLING)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in EXECUTING | LOADING:
                yield f"{line}: calls {called}"
            if called.endswith("from_pretrained"):
                yield from (f"{line}: {keyword}" for keyword in missing_keywords(called, node))
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            if ast.unparse(node.value) not in (node.arg, "False"):
                yield f"{line}: passes {ast.unparse(node)}"


def missing_keywords(called: str, node: ast.Call) -> Iterator[str]:
    """Models load safetensors alone; remote code is said no to, since transformers would ask on a terminal."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if "For" in called and given.get("use_safetensors") != "True":
        yield f"{called} without use_safetensors=True"
    if called.startswith("Auto") and not {"trust_remote_code", "local_files_only"} & set(given):
        yield f"{called} without trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sources(path: Path) -> None:
    assert list(problems(path.read_text())) == []


def test_data_files_hold_no_code() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files if path.parent != SOURCES_IN_CPP} <= DATA
    assert {path.suffix for path in files if path.parent == SOURCES_IN_CPP} == {".py", ".cpp", ".h"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "x = eval(text)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "AutoProcessor.from_pretrained(name, trust_remote_code=True)",
        "AutoProcessor.from_pretrained(name)",
        "AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=trust_remote_code)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_notices(source: str) -> None:
    assert list(problems(source)) != []
