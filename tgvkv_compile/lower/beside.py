"""The C++ compiler at work beside Python: Inductor asks it for one thing at a time, and waits for each.

On a CPU half of a first answer is such waiting: first for a dozen small programs that tell what the processor can do, then, for
each piece of a graph, for its kernels.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator

import torch

from tgvkv_compile.ops.kernels.cpu.compiled import compiled
from tgvkv_compile.private import digest_sources, kernels_put_off, precompile_header, probe_instructions


def prepare_inductor(model: torch.nn.Module | None = None) -> None:
    """Begins with what Inductor will want to know of the processor, where that is what a model runs on.

    Args:
        model: The model; None: none is known yet, and only a machine without accelerators leaves no choice.
    """
    if model is None:
        if not torch.accelerator.is_available():
            probe_processor()
    elif all(parameter.device.type == "cpu" for parameter in itertools.islice(model.parameters(), 1)):
        probe_processor()


@functools.cache
def probe_processor() -> threading.Thread:
    """Finds out in a thread which vector instructions there are, then does what else can be done early; once per process.

    In this order: what the first lookup in Inductor's caches waits for, its first kernel, and the first decode step.
    """
    probing = probe_instructions()

    def compile_kernels() -> None:
        digest_sources()
        probing.join()
        precompile_header()
        compiled()

    threading.Thread(target=compile_kernels, name="tgvkv-kernels", daemon=True).start()
    return probing


@contextlib.contextmanager
def kernels_beside() -> Iterator[None]:
    """Kernels of all graphs that Inductor compiles within are compiled meanwhile; they are there at the end.

    Whoever calls holds dynamo's compile lock, and calls no compiled graph within.
    """
    with kernels_put_off() as rest:
        yield
    for wait in rest:
        wait()
