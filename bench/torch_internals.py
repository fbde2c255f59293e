"""What the benchmarks need of torch beyond its public names. Checked on torch 2.11 and 2.13."""

import contextlib
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache


def compiles() -> int:
    """How much has been compiled by now: frames that dynamo was given, and graphs that AOTAutograd was.

    The second counts what this backend lowers when a program is first called, after dynamo is done with the frame.
    """
    return sum(counters["frames"].values()) + sum(counters["aot_autograd"].values())


def graphs() -> int:
    """How many graphs dynamo has handed to a backend, whichever it is."""
    return int(counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Within, Inductor finds nothing that was compiled before, in this process or another."""
    with fresh_cache(delete=False):
        yield


def forget() -> None:
    """Drops compiled code of the whole process, CUDA graphs included."""
    torch._dynamo.reset()
