"""An export appears whole: files are written beside their place, and moved when all of them are there."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tgvkv_compile.errors import ConfigError


def output_folder(directory: str | Path) -> Path:
    """Where to write; raises [`ConfigError`][] for a file."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"directory={str(directory)!r} is a file; give a folder to write to")
    return folder


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to; what is in it goes to `folder` at the end, in place of files of the same names.

    After an error `folder` is as it was.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield staging
        for path in staging.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging)
        if made and not any(folder.iterdir()):
            folder.rmdir()
