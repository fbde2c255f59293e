"""The backend object that dynamo calls with each graph."""

import atexit
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from tgvkv_compile.backend import dynamo
from tgvkv_compile.backend.analysis import Analysis, analyse
from tgvkv_compile.backend.arena_sizes import counter_of, fewest_vision, slots_of_example
from tgvkv_compile.backend.cut import Cut
from tgvkv_compile.backend.memory import with_budget
from tgvkv_compile.backend.options import BackendOptions, misplaced, read_options, takes
from tgvkv_compile.backend.programs import CachedProgram, PrefillProgram, Refusal, Source, key_weight
from tgvkv_compile.backend.versions import warn_of_untried
from tgvkv_compile.backend.vision_turn import LatePrefillProgram, VisionContinuationProgram
from tgvkv_compile.errors import ConfigError, TgvkvError
from tgvkv_compile.fx.dump import Dumper
from tgvkv_compile.lower import lower_dense, prepare_inductor
from tgvkv_compile.passes.rewrite import ArenaSizes
from tgvkv_compile.pipeline import rewrite_graph

log = logging.getLogger("tgvkv_compile")


@takes(BackendOptions)
def tgvkv_backend(**options: Any) -> "TgvkvBackend":
    """Makes a `torch.compile` backend that evicts KV under the guidance of the text (TGV-KV, arXiv 2606.03075).

    Give it to `model.compile(backend=...)` or `model.forward = torch.compile(model.forward, backend=...)`; a model whose
    `forward` is called directly may also be wrapped by `torch.compile(model, backend=...)`.

    Args:
        **options: The fields of `BackendOptions`, which says what each means; `budget` may be given by position.

    Raises:
        ConfigError: An option has a value that cannot be used.
        UnknownOptionError: There is no such option.
    """
    return TgvkvBackend(read_options(options, where="tgvkv_backend"))


class TgvkvBackend:
    """Called by dynamo with each graph; returns what runs in its place.

    Attributes:
        options: The options it was made with.
        graphs: How many graphs of each kind it was given.
        takes_handles: Graphs for this backend may be traced with handles as inputs (see `runtime.tracing`).
    """

    takes_handles = True

    def __init__(self, options: BackendOptions) -> None:
        self.options = options
        self.graphs: dict[str, int] = {}
        self._dumper = Dumper(options.dump_graphs)
        self._told: set[str] = set()
        prepare = prepare_inductor if options.lowering == "inductor" else None
        if prepare is not None:
            prepare()
        self.cut = Cut(self, strict=options.on_unsupported == "raise", prepare=prepare)
        warn_of_untried()
        if options.configure_dynamo:
            dynamo.configure()
        atexit.register(_warn_if_unreached, self.graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or not, is a fresh backend with these options: caches that this one made are not the copy's."""
        return type(self), (self.options,)

    @property
    def __name__(self) -> str:
        """`torch.compile` asks for it: the moment to look for model classes that were loaded since this was made."""
        if self.options.configure_dynamo:
            dynamo.configure()
        return "tgvkv"

    def __call__(self, gm: GraphModule, example_inputs: list[Any], **unknown: Any) -> Callable[..., Any]:
        """Compiles one graph.

        Args:
            gm: From dynamo.
            example_inputs: From dynamo, handles included.
            **unknown: What `torch.compile` was given for its backend. Refused.
        """
        if unknown:
            return Refusal(misplaced(unknown))
        graph = analyse(gm, example_inputs)
        plan = graph.plan
        self.graphs[plan.kind] = self.graphs.get(plan.kind, 0) + 1
        log.info("%s graph: %s (%d attention sites)", plan.kind, plan.reason, len(plan.sites))
        if graph.problem is not None:
            return self._unsupported(graph.problem, graph)
        if plan.kind == "dense":
            return self._dense(graph)
        try:
            return self._program(graph)
        except TgvkvError as error:
            return self._unsupported(error, graph)

    def _program(self, graph: Analysis) -> Callable[..., Any]:
        gm, plan = graph.gm, graph.plan
        try:
            options = with_budget(self.options, plan)
        except ConfigError as error:
            return Refusal(error)
        counter = counter_of(graph, options)
        slots = slots_of_example(graph, options, fewest_vision(counter, graph.inputs))
        rewrite = functools.partial(
            rewrite_graph,
            gm,
            graph.sizes,
            graph.compressed,
            options.eviction,
            ArenaSizes(slots, options.growth_reserve, options.prefill_cap),
            stop_after=options.stop_after,
            dumper=self._dumper,
        )
        if options.stop_after is not None:
            rewrite()
            self._tell(f"stop_after={options.stop_after!r}: graphs are rewritten for inspection, the model runs uncompressed")
            return self._dense(graph)
        source = Source(rewrite, options, self.options.memory, id(self), key_weight(plan, gm))
        if plan.kind == "prefill":
            return PrefillProgram(source, counter)
        if plan.kind == "late_prefill":
            return LatePrefillProgram(source)
        position = {node.name: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        appends = [append for site in plan.sites for append in (site.key, site.value)]
        pasts = [position[append.past.name] for append in appends if append.past is not None]
        program = VisionContinuationProgram if plan.kind == "vision_continuation" else CachedProgram
        return program(source, pasts)

    def _dense(self, graph: Analysis) -> Callable[..., Any]:
        options = self.options
        return lower_dense(graph.gm, graph.inputs, lowering=options.lowering, mode=options.mode, options=options.options)

    def _unsupported(self, error: TgvkvError, graph: Analysis) -> Callable[..., Any]:
        if graph.compressed or self.options.on_unsupported == "raise":
            return Refusal(error)
        self._tell(f"running uncompressed (on_unsupported='passthrough'): {error}")
        return self._dense(graph)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"tgvkv: {message}", stacklevel=2)


def _warn_if_unreached(graphs: dict[str, int]) -> None:
    if not graphs:
        warnings.warn(
            "tgvkv: a backend was made and never reached, so nothing was compressed. generate() of a wrapper is that of the "
            "model inside, which was not compiled; compile that one: of PEFT model.get_base_model(), of "
            "DistributedDataParallel, FSDP and accelerate model.module, instead of torch.compile(model) the model itself. "
            "tgvkv_compile.compile(model, ...) finds the right one; without a wrapper, model.compile(backend=...) does too",
            stacklevel=1,
        )
