"""What a user of the benchmarks can cause."""

import sys
from collections.abc import Callable


class BenchError(Exception):
    """Something asked for cannot be measured; the message is one line with thing, value and remedy."""


def exit_code(main: Callable[[], None]) -> int:
    """Runs `main`; 0, or 2 with the error in one line on stderr."""
    try:
        main()
    except BenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
