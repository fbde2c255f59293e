"""Runs the command line as a user does: in a process of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def tgvkv(*arguments: object, cwd: Path, before: str = "") -> Done:
    """Runs `tgvkv` with the sources of this tree; `before` is Python that the process runs first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    code = f"{before}\nfrom tgvkv_compile.cli import main\nmain()\n"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def succeeded(done: Done) -> Done:
    assert done.code == 0, f"exit code {done.code}\n{done.out}\n{done.err}"
    return done
