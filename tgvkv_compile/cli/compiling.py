"""While a graph is compiled, the terminal says which and for how long."""

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_LOGGER = logging.getLogger("tgvkv_compile")


@contextlib.contextmanager
def compiling_shown(console: Console, *, what: str = "", beside: Progress | None = None) -> Iterator[None]:
    """A line with a spinner on a terminal for as long as something is compiled within; it is gone afterwards.

    Args:
        console: Of standard error, so that what is piped on stays clean.
        what: What the graphs are of, where there are several models.
        beside: A display on the same console, which makes room meanwhile.
    """
    handler, level = _Shower(console, what, beside), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(min(level, logging.INFO) if level else logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        handler.stop()


@contextlib.contextmanager
def waiting_shown(what: str) -> Iterator[None]:
    """Within `compiling_shown`: one more line, above those of the graphs; for a compiler that tells nothing of its own."""
    _LOGGER.info("%s", what, extra={"compiling": what})
    try:
        yield
    finally:
        _LOGGER.info("%s: done", what, extra={"compiling": None})


class _Shower(logging.Handler):
    """Follows the log: records say by `compiling` that a graph is begun, and that it is done where that is None."""

    def __init__(self, console: Console, what: str, beside: Progress | None) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._what = f" for {what}" if what else ""
        self._beside = beside
        self._shown: Progress | None = None
        self._lines: list[TaskID] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one more line, or takes the last one away."""
        if not hasattr(record, "compiling") or not self._console.is_terminal:
            return
        if record.compiling is not None:
            self._begin(f"compiling{self._what}: {record.compiling}")
        elif self._shown is not None and len(self._lines) > 1:
            self._shown.remove_task(self._lines.pop())
        else:
            self.stop()

    def _begin(self, text: str) -> None:
        if self._shown is None:
            if self._beside is not None:
                self._beside.stop()
            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            self._shown = Progress(*columns, console=self._console, transient=True)
            self._shown.start()
        self._lines.append(self._shown.add_task(text, total=None))
        self._shown.refresh()

    def stop(self) -> None:
        """Takes all lines away."""
        if self._shown is None:
            return
        self._shown.stop()
        self._shown, self._lines = None, []
        if self._beside is not None:
            self._beside.start()
