"""Graph dumps: one readable file per graph and step, and the same text in `TORCH_TRACE` and the debug log."""

import itertools
import logging
from pathlib import Path

from torch.fx import GraphModule

from tgvkv_compile.private import trace_structured

log = logging.getLogger("tgvkv_compile.graphs")


class Dumper:
    """Writes graphs as they pass through the steps.

    Args:
        folder: Where to write `NNN-kind-step.py` files; None writes none (logs only).
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._count = itertools.count()

    def graph(self, gm: GraphModule, kind: str, step: str) -> None:
        """Dumps one graph under the name of the step that it comes from."""
        trace_structured(  # calls the functions only where TORCH_TRACE is set
            "artifact",
            metadata_fn=lambda: {"name": f"tgvkv_{kind}_{step}", "encoding": "string"},
            payload_fn=lambda: gm.print_readable(print_output=False),
        )
        if self._folder is None and not log.isEnabledFor(logging.DEBUG):
            return
        text = gm.print_readable(print_output=False)
        log.debug("%s graph after %s:\n%s", kind, step, text)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{next(self._count):03d}-{kind}-{step}.py").write_text(text, encoding="utf-8")
