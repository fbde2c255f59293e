"""The command line: `tgvkv demo`, `tgvkv run`, `tgvkv explain`. `tgvkv --help` tells more."""

import os

__all__ = ["main"]


def main() -> None:
    """Entry point of the `tgvkv` script."""
    # torch's worker threads spin while they wait; where cores are shared with anything else that makes a small model
    # several times slower. It is read when torch is loaded, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tgvkv_compile.cli.app import app

    app(prog_name="tgvkv")
