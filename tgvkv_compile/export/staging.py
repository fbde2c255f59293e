"""An export appears whole: files are written beside their place, and moved when all of them are there."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
