"""While a graph is compiled, the terminal says which and for how long."""

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LOGGER = logging.getLogger("tgvkv_compile")


@contextlib.contextmanager
def compiling_shown(console: Console) -> Iterator[None]:
    """A line with a spinner on a terminal for as long as something is compiled within; it is gone afterwards.

    Args:
        console: Of standard error, so that what is piped on stays clean.
    """
    handler, level = _Shower(console), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(min(level, logging.INFO) if level else logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        handler.stop()


class _Shower(logging.Handler):
    """Follows the log: records say by `compiling` that a graph is begun, and that it is done where that is None."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._shown: Progress | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the line, or takes it away."""
        if not hasattr(record, "compiling") or not self._console.is_terminal:
            return
        self.stop()
        if record.compiling is not None:
            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            self._shown = Progress(*columns, console=self._console, transient=True)
            self._shown.add_task(f"compiling: {record.compiling}", total=None)
            self._shown.start()

    def stop(self) -> None:
        """Takes the line away."""
        if self._shown is not None:
            self._shown.stop()
            self._shown = None
