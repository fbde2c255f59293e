"""Compiles what a launch would run, for a GPU that need not be there, and asks the assembler for registers and spills."""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

PROCESSORS = {80: 108, 90: 132}
"""Multiprocessors of an A100 and an H100 or H200, by compute capability."""
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_ARCHITECTURE = re.compile(r"^\.target (\w+)", re.MULTILINE)
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        name: Of the kernel.
        registers: Per thread.
        spilled: Bytes per thread that do not fit into them, stored and loaded.
        shared: Bytes of a block's shared memory.
    """

    name: str
    registers: int
    spilled: int
    shared: int


class _Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self._target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def compiling_only(capability: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Usage]]:
    """Within, a launch compiles its kernel for the compute capability and runs nothing; what it takes is listed."""
    compiled: list[Usage] = []
    launch = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(usage_of(kernel, self.__name__))
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", run)
        patch.setattr(type(driver), "active", property(lambda _: _Absent(capability)))
        yield compiled


def usage_of(kernel: Any, name: str) -> Usage:
    """Runs the assembler that comes with Triton once more, which tells."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        architecture = _ARCHITECTURE.search(kernel.asm["ptx"])
        assert architecture is not None
        options = ["--verbose", f"--gpu-name={architecture[1]}", f"--output-file={folder}/kernel.cubin"]
        command = [knobs.nvidia.ptxas.path, *options, str(source)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills, registers = _SPILLS.search(told), _REGISTERS.search(told)
    assert spills is not None and registers is not None, told
    return Usage(name, int(registers[1]), int(spills[1]) + int(spills[2]), kernel.metadata.shared)
