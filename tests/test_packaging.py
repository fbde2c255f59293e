"""The distribution: what the wheel and the sdist hold, and that the wheel works where the sources are not."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
ASSETS = ("config.json", "held_out_scans.safetensors", "model.safetensors", "tokenizer.json")
SHIPPED_SUFFIXES = {".py", ".typed", ".json", ".safetensors", ".md", ".txt"}
IMPORT_SECONDS = 2.0
NOT_IMPORTED = ("matplotlib", "onnx", "onnxruntime", "onnxscript", "sklearn", "torch_tensorrt", "transformers")


@dataclass(frozen=True)
class Distribution:
    """The built files and what lies in them; the sdist's own top folder is taken off its names."""

    wheel: Path
    wheel_names: frozenset[str]
    sdist_names: frozenset[str]


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Runs a command to its end and returns what it printed; with `path`, Python looks for modules there first."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    out = tmp_path_factory.mktemp("dist")
    # Without a choice of format the wheel is built from the sdist, so the sdist is complete when the wheel is.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = frozenset(archive.namelist())
    with tarfile.open(sdist) as archive:
        sdist_names = frozenset(member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile())
    return Distribution(wheel, wheel_names, sdist_names)


@pytest.fixture(scope="module")
def installed(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--target", target, distribution.wheel, cwd=target)
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path


def package_files() -> set[str]:
    """Every file of the package in the working tree that users need."""
    found = (ROOT / "tgvkv_compile").rglob("*")
    return {str(path.relative_to(ROOT)) for path in found if path.is_file() and path.suffix in SHIPPED_SUFFIXES}


def test_wheel_holds_the_package_and_nothing_else(distribution: Distribution) -> None:
    tops = {name.split("/", 1)[0] for name in distribution.wheel_names}
    assert tops == {"tgvkv_compile", f"tgvkv_compile-{VERSION}.dist-info"}


def test_wheel_holds_every_file_of_the_package(distribution: Distribution) -> None:
    assert package_files() - distribution.wheel_names == set()


def test_wheel_holds_the_small_model_and_the_type_marker(distribution: Distribution) -> None:
    wanted = {f"tgvkv_compile/digits/assets/{name}" for name in ASSETS} | {"tgvkv_compile/py.typed"}
    assert wanted - distribution.wheel_names == set()


def test_wheel_carries_the_license(distribution: Distribution) -> None:
    assert f"tgvkv_compile-{VERSION}.dist-info/licenses/LICENSE" in distribution.wheel_names


def test_sdist_holds_the_sources_without_tests_and_links(distribution: Distribution) -> None:
    beside = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
    assert (package_files() | beside) - distribution.sdist_names == set()
    tops = {name.split("/", 1)[0] for name in distribution.sdist_names}
    assert tops - {"PKG-INFO", ".gitignore"} == {"tgvkv_compile"} | beside


def test_installed_wheel_imports_from_another_folder(installed: Path, elsewhere: Path) -> None:
    code = "import tgvkv_compile; print(tgvkv_compile.__file__); print(tgvkv_compile.__version__)"
    file, version = run(sys.executable, "-c", code, cwd=elsewhere, path=installed).split()
    assert Path(file).is_relative_to(installed)
    assert version == VERSION


def test_installed_wheel_registers_the_backend_by_name(installed: Path, elsewhere: Path) -> None:
    code = (
        "import sys, torch._dynamo as dynamo\n"
        "assert 'tgvkv' in dynamo.list_backends(), dynamo.list_backends()\n"
        "assert 'tgvkv_compile' not in sys.modules, 'listing backends must not import this one'\n"
        "backend = dynamo.lookup_backend('tgvkv')\n"
        "import tgvkv_compile.backend.by_name as by_name\n"
        "assert backend is by_name.tgvkv and callable(backend)\n"
        "print(by_name.__file__)\n"
    )
    assert Path(run(sys.executable, "-c", code, cwd=elsewhere, path=installed).strip()).is_relative_to(installed)


def test_installed_command_line_prints_its_version(installed: Path, elsewhere: Path) -> None:
    module = run(sys.executable, "-m", "tgvkv_compile.cli", "--version", cwd=elsewhere, path=installed)
    script = run(sys.executable, installed / "bin" / "tgvkv", "--version", cwd=elsewhere, path=installed)
    assert VERSION in module.split()
    assert script == module


def test_import_is_fast_and_leaves_optional_packages_alone(elsewhere: Path) -> None:
    code = (
        "import json, sys, time, torch\n"
        "begun = time.perf_counter()\n"
        "import tgvkv_compile\n"
        "print(json.dumps([time.perf_counter() - begun, sorted(sys.modules)]))\n"
    )
    runs = [json.loads(run(sys.executable, "-c", code, cwd=elsewhere)) for _ in range(3)]
    assert [name for name in NOT_IMPORTED if name in runs[0][1]] == []
    assert min(seconds for seconds, _ in runs) < IMPORT_SECONDS


def test_changelog_has_the_version() -> None:
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_passes_in_sight_are_the_package_s_own() -> None:
    assert (ROOT / "passes").resolve() == ROOT / "tgvkv_compile" / "passes"


def test_sources_name_no_folder_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.])/(?:work|root)/")
    suffixes = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}
    folders = ("tgvkv_compile", "tests", "bench", "docs", ".ci")
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources = [path for path in files if path.suffix in suffixes and path.name != ".git"]
    assert ROOT / "Makefile" in sources
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if private.search(line)
    ]
    assert found == []
