"""The one runner of passes, for graphs from dynamo and exported graphs alike."""

import dataclasses
from collections.abc import Callable, Sequence

from tgvkv_compile.errors import InternalError
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.fx.verify import verify
from tgvkv_compile.passes.rewrite import Rewrite

Pass = Callable[[Rewrite], None]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass in a list of them.

    Attributes:
        run: The pass.
        requires: Passes that the list must have before it.
    """

    run: Pass
    requires: tuple[Pass, ...] = ()

    @property
    def name(self) -> str:
        """The pass's name, for `stop_after`, dumps and messages."""
        return self.run.__name__


def in_order(*steps: Step) -> tuple[Step, ...]:
    """The list of what one kind of graph goes through.

    Raises:
        InternalError: A pass does not stand behind all that it requires.
    """
    seen: list[Pass] = []
    for step in steps:
        missing = [needed.__name__ for needed in step.requires if needed not in seen]
        if missing:
            raise InternalError(f"{step.name} requires {', '.join(missing)} before it")
        seen.append(step.run)
    return steps


def run_steps(rewrite: Rewrite, steps: Sequence[Step], *, dumper: Dumper | None = None, stop_after: str | None = None) -> None:
    """Runs passes one after the other, verifying the graph after each.

    Args:
        rewrite: The graph; its metadata lives in `rewrite.environment`.
        steps: What to run, in order.
        dumper: Writes the graph after each step.
        stop_after: Name of the last pass to run; the graph is then for looking at, not for running.

    Raises:
        InternalError: A pass broke the graph.
    """
    for step in steps:
        with rewrite.environment.tracing():
            step.run(rewrite)
        verify(rewrite.gm, after=step.name, pending=rewrite.pending())
        if dumper is not None:
            dumper.graph(rewrite.gm, rewrite.plan.kind, step.name)
        if step.name == stop_after:
            break
