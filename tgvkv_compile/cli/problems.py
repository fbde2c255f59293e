"""What a user can get wrong at the command line, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from tgvkv_compile.errors import TgvkvError

USAGE_ERROR = 2


class CommandError(TgvkvError, ValueError):
    """An argument of a command cannot be used."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turns errors raised on purpose into a message on stderr and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except TgvkvError as error:
        text = str(error)
        typer.echo(text if text.startswith("tgvkv:") else f"tgvkv: {text}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
