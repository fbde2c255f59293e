"""An export appears whole: files are written beside their place, and moved when all of them are there."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tgvkv_compile.errors import ConfigError


def output_folder(directory: str | Path) -> Path:
    """Where to write, once it is known that something can be written there.

    Raises:
        ConfigError: It, or a folder above it, is a file, or cannot be written to.
    """
    folder = Path(directory)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"directory={str(directory)!r}: {there} is a file; give a folder to write to")
        Path(tempfile.mkdtemp(prefix=_STAGING, dir=there)).rmdir()  # permissions do not tell: a file system may be read-only
    except OSError as error:
        raise ConfigError(
            f"directory={str(directory)!r} cannot be written to: {error.strerror or type(error).__name__}; give another folder"
        ) from None
    return folder


_STAGING = ".export-"


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to; what is in it goes to `folder` at the end, in place of files of the same names.

    After an error `folder` is as it was.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
        for path in staging.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging)
        if made and not any(folder.iterdir()):
            folder.rmdir()
