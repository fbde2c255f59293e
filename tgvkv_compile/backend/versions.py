"""Releases of torch and transformers that this package has been tried on."""

import functools
import re
import sys
import warnings

import torch

NEWEST = {"torch": (2, 14), "transformers": (5, 24)}
"""The newest release of each that tests have run on; `docs/models.md#versions` says which ones."""


@functools.cache
def warn_of_untried() -> None:
    """Warns, once in a process, where something that is installed is newer than what this package was ever tried on.

    It uses parts of torch that are not public (`tgvkv_compile.private`), so a newer one may do otherwise.
    """
    installed = {"torch": torch.__version__, "transformers": getattr(sys.modules.get("transformers"), "__version__", "")}
    newer = [f"{name} {version}" for name, version in installed.items() if release(version) > NEWEST[name]]
    if newer:
        known = ", ".join(f"{name} {'.'.join(map(str, number))}" for name, number in NEWEST.items())
        warnings.warn(
            f"tgvkv: {' and '.join(newer)} never tried with this package; the newest that were are {known}. Compare an answer "
            "with the uncompiled model's at budget=1.0 before you rely on it",
            stacklevel=3,
        )


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as `2.14.1+cu130`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
