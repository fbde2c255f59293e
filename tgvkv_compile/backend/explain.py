"""What the backend would do with a model: a run under dynamo that finds and plans, and compiles nothing."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.backend import dynamo
from tgvkv_compile.backend.analysis import Analysis, analyse
from tgvkv_compile.backend.apart import compile_apart
from tgvkv_compile.backend.arena_sizes import counter_of, fewest_vision, slots_of_example
from tgvkv_compile.backend.cut import Cut
from tgvkv_compile.backend.explanation import CacheEstimate, Explanation, GraphReport, SiteReport
from tgvkv_compile.backend.memory import forms_of, with_budget
from tgvkv_compile.backend.options import BackendOptions, read_options
from tgvkv_compile.backend.wrappers import module_of
from tgvkv_compile.errors import NoAttentionError
from tgvkv_compile.fx.meta import fake_tensor, source_line
from tgvkv_compile.fx.subgraphs import all_nodes
from tgvkv_compile.fx.targets import op_kind, target_name
from tgvkv_compile.ops.eviction.budgeting import kept_bound
from tgvkv_compile.plan import AttentionSite
from tgvkv_compile.runtime.inspect import CACHE_NAMES
from tgvkv_compile.runtime.logical import LogicalKV


def explain(
    model: torch.nn.Module, inputs: Mapping[str, Any], budget: float | int | None = None, **options: Any
) -> Explanation:
    """Runs a model's forward once, uncompiled, and tells what the backend would find, miss and do.

    The model stays as it is, compiled or not, and so do dynamo's flags: with `configure_dynamo=True` (the default) they are
    set for the run only; what `backend.dynamo` changes in dynamo besides its flags stays. So does a `cache`
    (`past_key_values` until transformers 5.23) among the inputs; a compressed one tells what a later turn would do.

    Args:
        model: A transformers vision-language model; it may be compiled.
        inputs: Of a call of it, as the processor makes them.
        budget: As for `tgvkv_backend`.
        **options: The other options of `tgvkv_backend`.

    Raises:
        ConfigError: An option is unknown or out of range.
        NoAttentionError: No graph holds attention over a KV cache.
    """
    record = read_options({"budget": budget, **options}, where="explain")
    model = module_of(model)
    inputs = {name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in inputs.items()}
    finder = _Finder(record)
    with torch.no_grad(), dynamo.configured() if record.configure_dynamo else contextlib.nullcontext():
        compile_apart(model._call_impl, finder)(**inputs)
    graphs = tuple(finder.graphs)
    if not any(graph.sites or graph.missed for graph in graphs):
        raise NoAttentionError(_nothing_found(type(model).__name__, graphs))
    return Explanation(type(model).__name__, record.eviction, graphs, finder.capacity)


class _Finder:
    """A backend that looks at each graph and lets it run as it is, on zeros where a compressed cache has no data to read."""

    takes_handles = True

    def __init__(self, options: BackendOptions) -> None:
        self.options = options
        self.graphs: list[GraphReport] = []
        self.capacity: CacheEstimate | None = None
        self.cut = Cut(self, strict=options.on_unsupported == "raise")

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graph = analyse(gm, inputs)
        found, plan = graph.found, graph.plan
        report = GraphReport(
            plan.kind,
            plan.reason,
            tuple(_site_report(layer, site) for layer, site in enumerate(found.sites)),
            plan.misses or found.misses,
            None if graph.broke is None else dynamo.break_place(graph.broke),
            graph.problem,
            None if found.sites else _candidate(graph.gm),
        )
        self.graphs.append(report)
        if plan.kind == "prefill" and graph.problem is None:
            self.capacity = _capacity(graph, self.options)
        return _run_readable(graph.gm)


def _run_readable(gm: GraphModule) -> Callable[..., Any]:
    return lambda *values: gm.forward(*(_readable(value) for value in values))


def _readable(value: Any) -> Any:
    """Zeros in the place of a handle; what they lead to is thrown away."""
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if isinstance(value, LogicalKV) else value


def _site_report(layer: int, site: AttentionSite) -> SiteReport:
    query, key = fake_tensor(site.query), fake_tensor(site.key.node)
    return SiteReport(
        layer,
        site.node.name,
        site.form,
        int(query.shape[1]),
        int(key.shape[1]),
        int(key.shape[3]),
        source_line(site.node),
    )


def _candidate(gm: GraphModule) -> str | None:
    """The operation most like an attention."""
    for kind in ("sdpa", "flex", "softmax", "matmul", "linear"):
        for node in all_nodes(gm):
            if node.op != "placeholder" and op_kind(node) == kind:
                return _describe(node)
    return None


def _describe(node: Node) -> str:
    return f"%{node.name} = {target_name(node)} at {source_line(node).partition(', ')[0]}"


def _capacity(graph: Analysis, options: BackendOptions) -> CacheEstimate:
    plan = graph.plan
    options = with_budget(options, plan)
    vision = fewest_vision(counter_of(graph, options), graph.inputs)
    slots = slots_of_example(graph, options, vision)
    batch, heads, length, _ = (int(size) for size in fake_tensor(plan.sites[0].key.node).shape)
    forms = forms_of(plan, options)
    layers = plan.num_layers
    return CacheEstimate(
        num_layers=layers,
        batch_size=batch,
        prompt_length=length,
        kept_tokens=kept_bound(layers, length, config=options.eviction, num_vision=vision),
        growth_reserve=options.growth_reserve,
        arena_slots=slots,
        full_bytes=batch * layers * length * heads * forms.unquantised_bytes,
        compact_bytes=batch * slots * (heads * forms.bytes + torch.int32.itemsize),
    )


def _nothing_found(model: str, graphs: Iterable[GraphReport]) -> str:
    candidates = [graph.candidate for graph in graphs if graph.candidate is not None]
    # The decoder comes last; what stands nearest in the graphs before it is the vision tower's.
    nearest = f"the nearest candidate is {candidates[-1]}" if candidates else "there is not even a matrix product"
    return (
        f"no attention over a KV cache was found in any graph of {model}; {nearest}. A site is an attention that reads a "
        "cat([past, new]) which the graph returns: call the model with use_cache=True and a DynamicCache (or no cache), "
        "check with TORCH_LOGS=graph_breaks that dynamo compiles its decoder, and give the model itself, not a wrapper"
    )
