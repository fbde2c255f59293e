"""Runs the kernels in Triton's interpreter, in processes of their own: it is chosen when the kernels are first imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.__version__ < "3.7":
    pytest.skip(f"the interpreter of Triton {triton.__version__} fails with NumPy 2.4", allow_module_level=True)
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("file", ["check_decode.py", "check_ops.py", "check_prefill.py", "check_quantised.py"])
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted" / file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
