"""What dynamo's compiled frames call: a rewritten graph with the compact cache swapped in for the handles."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tgvkv_compile.backend.arena_sizes import fewest_vision
from tgvkv_compile.backend.callers import refuse_assisted_decoding
from tgvkv_compile.backend.memory import check_question, forms_of
from tgvkv_compile.backend.options import BackendOptions
from tgvkv_compile.errors import (
    CacheError,
    ForeignCacheError,
    GradientsRequiredError,
    PaddingError,
    SplitDecoderError,
    StaleCacheError,
    TgvkvError,
)
from tgvkv_compile.fx.environment import size_reader
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.fx.subclasses import first_storage
from tgvkv_compile.lower import Lowered, lower_rewritten, records_cuda_graphs
from tgvkv_compile.ops.state import CompactState, Prefilled, split_off
from tgvkv_compile.passes.rewrite import Rewrite
from tgvkv_compile.plan import GraphPlan
from tgvkv_compile.private import compile_lock
from tgvkv_compile.runtime.arena_pool import ArenaPool
from tgvkv_compile.runtime.compact import CacheIdentity, CompactCache, arena_slots
from tgvkv_compile.runtime.logical import LogicalKV, make_handle

log = logging.getLogger("tgvkv_compile")

REPLAYING = ("cuda",)
"""Types of devices that have CUDA graphs."""


class Refusal:
    """Raises when it is called. The error is raised here, not while compiling, so that nothing can swallow it."""

    def __init__(self, error: TgvkvError) -> None:
        self._error = error

    def __call__(self, *inputs: Any) -> Any:
        """Raises the error."""
        raise self._error


@dataclasses.dataclass(frozen=True)
class Source:
    """What a program is made of.

    Attributes:
        rewrite: Gives the rewritten graph, a new one each time.
        options: Of the backend, `memory` turned into a budget.
        memory: Bytes that were asked for in place of a budget.
        backend: Its `id`.
        weight: From `key_weight`.
    """

    rewrite: Callable[[], Rewrite]
    options: BackendOptions
    memory: int | str | None
    backend: int
    weight: int | None

    def identity(self, inputs: Sequence[Any], layers: int) -> CacheIdentity:
        """Whose cache it is that a call with these inputs makes."""
        weight = 0 if self.weight is None else address_of(inputs[self.weight])
        return CacheIdentity(self.backend, weight, layers)


class CompiledRewrite:
    """A rewritten graph, lowered at its first call and again where a size falls outside what was compiled for."""

    def __init__(self, source: Source, first: Rewrite, static: Collection[str] | None = None) -> None:
        self._source, self._static = source, static
        self._first: Rewrite | None = first
        self._variants: tuple[Lowered, ...] = ()

    def fitting(self, inputs: Sequence[Any]) -> Lowered:
        """What runs a call with these inputs; lowers the graph where nothing fits yet. Computes nothing."""
        lowered = self._accepting(inputs)
        if lowered is None:
            with compile_lock:  # another thread may be compiling, this graph or any other
                lowered = self._accepting(inputs) or self._lower()
        return lowered

    def _accepting(self, inputs: Sequence[Any]) -> Lowered | None:
        return next((lowered for lowered in self._variants if lowered.accepts(inputs)), None)

    def _lower(self) -> Lowered:
        # Lowering uses the graph up: one that was interrupted must not get the same graph again.
        first, self._first = self._first, None
        rewrite = first if first is not None else self._source.rewrite()
        options = self._source.options
        with _logged(f"{rewrite.plan.kind} graph of {rewrite.plan.num_layers} layers"):
            lowered = lower_rewritten(
                rewrite.gm,
                rewrite.environment,
                lowering=options.lowering,
                mode=options.mode,
                options=options.options,
                static=self._static,
            )
        self._variants = (lowered, *self._variants)
        return lowered


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Logs that a graph is compiled, and how long that took; the command line shows it meanwhile (`cli.compiling`)."""
    started = time.monotonic()
    log.info("compiling a %s", what, extra={"compiling": what})
    done = False
    try:
        yield
        done = True
    finally:
        word = "compiled" if done else "failed to compile"
        log.info("%s a %s in %.1f s", word, what, time.monotonic() - started, extra={"compiling": None})


def check_gradients(inputs: Sequence[Any]) -> None:
    """Raises [`GradientsRequiredError`][] where autograd would have to go through an eviction."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise GradientsRequiredError(
            "gradients are required (grad mode is on and the model's parameters require them), but KV eviction is not "
            "differentiable; call the model under torch.no_grad() or torch.inference_mode(), as generate() does, or, to train, "
            "pass use_cache=False, which runs without a cache and evicts nothing"
        )


def key_weight(plan: GraphPlan, gm: GraphModule) -> int | None:
    """Index of the graph input that is a weight of the first layer's keys, by which a model is recognised."""
    position = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    frontier: list[Node] = [plan.sites[0].key.new]
    seen = set(frontier)
    while frontier:
        for node in frontier:
            if node in position and "tensor_dict" in node.meta and "weight" in node.name:
                return position[node]
        frontier = [parent for node in frontier for parent in node.all_input_nodes if parent not in seen]
        seen.update(frontier)
    return None


def check_padding(valid: Tensor) -> None:
    """Raises [`PaddingError`][] where a sample is padded on the right; `valid` is bool `[B, N]`."""
    if not bool(valid[:, -1].all()):
        sample = int((~valid[:, -1]).nonzero()[0, 0])
        raise PaddingError(
            f"sample {sample} of the batch is padded on the right; set tokenizer.padding_side = 'left' "
            "(processor.tokenizer.padding_side = 'left') and tokenize again"
        )


def address_of(weight: Tensor) -> int:
    """Where a weight's data is; of one that is sharded over ranks, this rank's shard, of a quantised one its first tensor."""
    return first_storage(weight).data_ptr()


def put_handles(outputs: list[Any], slots: Sequence[tuple[int, int]], compact: CompactCache) -> None:
    """Puts handles of the present length in the places of keys and values, `slots` of each layer."""
    for layer, (key, value) in enumerate(slots):
        outputs[key] = make_handle(compact, layer, "key")
        outputs[value] = make_handle(compact, layer, "value")


class PrefillProgram:
    """Runs a rewritten prefill and wraps its compact state into a cache and handles."""

    def __init__(self, source: Source, counter: GraphModule | None) -> None:
        first = source.rewrite()
        plan = first.plan
        self._compiled = CompiledRewrite(source, first)
        self._source = source
        self._layers = plan.num_layers
        self._slots = [(site.key.output, site.value.output) for site in plan.sites]
        self._forms = forms_of(plan, source.options)
        self._length = size_reader(first.gm, fake_tensor(plan.sites[0].key.node).shape[2])
        self._counter = counter

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, handles in the places of keys and values."""
        check_gradients(inputs)
        refuse_assisted_decoding()
        length = self._length(inputs)
        options = self._source.options
        slots = arena_slots(
            self._layers,
            length,
            options.growth_reserve,
            config=options.eviction,
            num_vision=fewest_vision(self._counter, inputs),
        )
        given = [*inputs, slots]
        results = self._compiled.fitting(given)(*given)
        results, told = split_off(results, Prefilled)
        outputs, state = split_off(results, CompactState)
        if told.valid is not None:
            check_padding(told.valid)
        check_question(options, self._source.memory, told.history, state.lengths)
        compact = CompactCache(
            state,
            forms=self._forms,
            config=options.eviction,
            identity=self._source.identity(inputs, self._layers),
            history=told.history,
            logical_length=length,
            reserve=options.growth_reserve,
            # Only where some samples are shorter can there be less room than asked for; then reading it costs no stall
            # that the check for padding above has not cost already.
            room=options.growth_reserve if told.valid is None else int(told.room),
        )
        put_handles(outputs, self._slots, compact)
        return outputs


class CachedProgram:
    """Runs a rewritten decode step or continuation on the compact cache that its handles stand for."""

    def __init__(self, source: Source, pasts: list[int]) -> None:
        first = source.rewrite()
        plan, options = first.plan, source.options
        self._kind = plan.kind
        replayed = plan.kind == "decode" and records_cuda_graphs(options.lowering, options.mode, options.options)
        self._pool = ArenaPool() if replayed else None
        static = {f"tgvkv_{name}" for name in CompactState._fields} if replayed else None
        self._compiled = CompiledRewrite(source, first, static)
        self._source = source
        self._slots = [(site.key.output, site.value.output) for site in plan.sites]
        self._pasts = pasts  # key and value of each layer, by turns
        self._dropped = frozenset(pasts)
        self._padded = plan.kind == "continuation" and plan.sites[0].mask is not None
        reader = size_reader(first.gm, fake_tensor(plan.sites[0].query).shape[2])
        self._tokens: Callable[[Sequence[Any]], int] = reader

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them, with handles one step longer."""
        check_gradients(inputs)
        if self._kind == "continuation":
            refuse_assisted_decoding()
        compact = self._compact(inputs)
        rest = self._rest(inputs)
        tokens = self._tokens([*rest, *compact.state])
        compact.ensure_room(tokens, appended=self._kind == "continuation")
        if self._pool is not None and compact.device.type in REPLAYING:
            self._pool.settle(compact)
        given = [*rest, *compact.state]
        lowered = self._compiled.fitting(given)  # may take long and be interrupted; the cache is whole until it has run
        compact.broken = f"a {self._kind} step failed half-way"
        outputs = lowered(*given)
        compact.advance(tokens, outputs.pop())
        compact.padded_turns = compact.padded_turns or (self._padded and compact.batch > 1)
        compact.broken = None
        put_handles(outputs, self._slots, compact)
        return outputs

    def _rest(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs without handles."""
        return [value for index, value in enumerate(inputs) if index not in self._dropped]

    def _compact(self, inputs: Sequence[Any]) -> CompactCache:
        handles = [inputs[index] for index in self._pasts]
        first = handles[0]
        if not isinstance(first, LogicalKV):
            raise CacheError("this graph was compiled for a compressed KV cache and was given plain tensors")
        compact = first.compact
        for index, handle in enumerate(handles):
            if not isinstance(handle, LogicalKV) or handle.compact is not compact:
                raise CacheError(f"layer {index // 2} of the KV cache belongs to another cache than layer 0 does")
            role = "value" if index % 2 else "key"
            if handle.role != role or handle.layer != index // 2:
                raise CacheError(f"the {role}s of layer {index // 2} were given as the {handle.role}s of {handle.layer}")
            if handle.shape[2] != compact.logical_length:
                raise StaleCacheError(
                    f"stale KV cache: it has {handle.shape[2]} tokens, but {compact.logical_length} have been put into it "
                    "since; a compressed cache is updated in place, so copy.deepcopy(cache) before branching off"
                )
        self._check_owner(compact, inputs)
        compact.usable()
        return compact

    def _check_owner(self, compact: CompactCache, inputs: Sequence[Any]) -> None:
        identity, source = compact.identity, self._source
        if identity.layers != len(self._slots):
            raise SplitDecoderError(
                f"this graph holds {len(self._slots)} of the {identity.layers} layers of the KV cache: dynamo split the "
                "decoder; TORCH_LOGS=graph_breaks tells where"
            )
        if identity.backend != source.backend:
            raise ForeignCacheError(
                "this KV cache was compressed by another backend (another compiled model, or another call of "
                "tgvkv_backend); give each model the caches that it made itself"
            )
        if source.weight is not None and address_of(inputs[source.weight]) != identity.weight:
            raise ForeignCacheError(
                "this KV cache was made by another model (the weights of its first layer are not this model's); give each "
                "model the caches that it made itself"
            )
