"""What `explain` tells: records, and how they read as text."""

import dataclasses
from collections.abc import Sequence

from tgvkv_compile.config import EvictionConfig, name_of
from tgvkv_compile.errors import TgvkvError
from tgvkv_compile.plan import GraphKind, Miss

_LATER: dict[GraphKind, str] = {
    "decode": "append one token to the compressed cache, and evict at most one entry per layer",
    "continuation": "append a later turn to the compressed cache: all its tokens are kept, nothing is evicted",
    "late_prefill": "compress the cache, which holds text only so far, with the new tokens, and evict while decoding",
    "vision_continuation": "share the budget out again over what the compressed cache still holds and the new tokens",
}


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention over the KV cache.

    Attributes:
        layer: Its place among the sites of its graph.
        node: Name of the graph node.
        form: `"sdpa"`, or `"eager"` (written out: matmul, softmax, matmul).
        heads: H.
        kv_heads: Hkv.
        head_dim: D.
        source: `file:line, code` of the model source.
    """

    layer: int
    node: str
    form: str
    heads: int
    kv_heads: int
    head_dim: int
    source: str


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph that dynamo made.

    Attributes:
        kind: What the backend takes it for.
        reason: Why.
        sites: The attention sites found.
        missed: What looks like a site and cannot be rewritten.
        broke_at: `file:line: why` of the graph break that ended the graph; None where it ended with its function.
        problem: The error that the backend would raise, or None.
        candidate: The operation most like an attention in a graph without sites, or None.
    """

    kind: GraphKind
    reason: str
    sites: tuple[SiteReport, ...]
    missed: tuple[Miss, ...]
    broke_at: str | None
    problem: TgvkvError | None
    candidate: str | None


@dataclasses.dataclass(frozen=True)
class CacheEstimate:
    """How large the compressed cache of this prompt is. Bytes are of keys and values of the whole batch.

    Attributes:
        num_layers: L.
        batch_size: B.
        prompt_length: N, padding counted.
        kept_tokens: At most so many entries are kept of a sample's prompt, summed over layers; how layers share them
            depends on the picture and the question.
        growth_reserve: Decode steps that the arena has room for before it grows.
        arena_slots: T, slots of a sample's arena, all layers together: kept entries, growth, rounding.
        full_bytes: The prompt's KV uncompressed.
        compact_bytes: The arena.
    """

    num_layers: int
    batch_size: int
    prompt_length: int
    kept_tokens: int
    growth_reserve: int
    arena_slots: int
    full_bytes: int
    compact_bytes: int

    @property
    def tokens_per_layer(self) -> float:
        """The bound on what a layer keeps, on average."""
        return self.kept_tokens / self.num_layers

    @property
    def saved_bytes(self) -> int:
        """What compression saves; negative where the arena's reserve is larger than a short prompt's KV."""
        return self.full_bytes - self.compact_bytes


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the backend would do; `str()` of it is a readable report.

    Attributes:
        model: Name of the model's class.
        eviction: The eviction options.
        graphs: In the order in which dynamo made them.
        capacity: Of the compressed cache; None where nothing is compressed.
    """

    model: str
    eviction: EvictionConfig
    graphs: tuple[GraphReport, ...]
    capacity: CacheEstimate | None

    @property
    def problems(self) -> tuple[TgvkvError, ...]:
        """The errors that the backend would raise."""
        return tuple(graph.problem for graph in self.graphs if graph.problem is not None)

    @property
    def plan(self) -> str:
        """What would happen, in one sentence."""
        if self.problems:
            return "the decoder cannot be rewritten; the backend would raise " + type(self.problems[0]).__name__
        if self.capacity is not None:
            return f"compress the KV of {self.capacity.num_layers} layers when the prompt is read, and evict while decoding"
        later = [_LATER[graph.kind] for graph in self.graphs if graph.kind in _LATER]
        if later:
            return later[0]
        return "the prompt is text-only (no vision features are merged): it would run dense, nothing is evicted"

    def __str__(self) -> str:
        config = self.eviction
        size = f"budget={config.budget} of {config.budget_of}" if config.memory is None else f"memory={config.memory} bytes"
        held = "" if config.kv_dtype is None else f", kv_dtype={config.kv_dtype}"
        lines = [
            f"{self.model}, {size}, ranking={name_of(config.ranking)}, "
            f"budgeting={name_of(config.budgeting)}, decode={config.decode}{held}"
        ]
        described = [_graph_lines(graph) for graph in self.graphs]
        for first, last in _runs(described):
            number = f"graph {first}" if first == last else f"graphs {first} to {last}"
            lines += [f"{number}: {described[first][0]}", *described[first][1:]]
        lines.append(f"plan: {self.plan}")
        if self.capacity is not None:
            lines += _capacity_lines(self.capacity)
        return "\n".join(lines)


def _graph_lines(graph: GraphReport) -> list[str]:
    lines = [f"{graph.kind}, {graph.reason}"]
    sites = [
        f"{site.form}, {site.heads} heads on {site.kv_heads}, head dim {site.head_dim}\n    at {_short(site.source)}"
        for site in graph.sites
    ]
    for first, last in _runs(sites):
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        lines += f"  {layers}: {sites[first]}".splitlines()
    for miss in graph.missed:
        lines.append(f"  missed %{miss.node} = {miss.target}: {miss.reason}")
        lines.append(f"    at {_short(miss.source)}")
    if graph.problem is not None and not graph.missed:
        lines.append(f"  {type(graph.problem).__name__}: {str(graph.problem).splitlines()[0]}")
    if graph.broke_at is not None:
        lines.append(f"  dynamo broke the graph at {_short(graph.broke_at)}")
    return lines


def _runs(items: Sequence[object]) -> list[tuple[int, int]]:
    """First and last index of each run of equal items."""
    runs: list[tuple[int, int]] = []
    for index, item in enumerate(items):
        if runs and items[runs[-1][0]] == item:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _short(source: str) -> str:
    """A source line with the last three parts of its path."""
    path, colon, rest = source.partition(":")
    return "/".join(path.split("/")[-3:]) + colon + rest


def _capacity_lines(capacity: CacheEstimate) -> list[str]:
    full, compact, saved = capacity.full_bytes, capacity.compact_bytes, capacity.saved_bytes
    reserve = capacity.growth_reserve
    verdict = f"saves {size(saved)} ({saved / full:.0%})"
    if saved < 0:
        verdict = f"costs {size(-saved)} more: room for {reserve} steps is larger than the KV of so short a prompt"
    return [
        f"  prompt: {capacity.batch_size} x {capacity.prompt_length} tokens, {capacity.num_layers} layers",
        f"  kept: at most {capacity.kept_tokens} entries over all layers, {capacity.tokens_per_layer:.1f} per layer on average",
        f"  arena: {capacity.arena_slots} slots per sample, with room for {reserve} decode steps before it grows",
        f"  bytes: full KV {size(full)}, arena {size(compact)}; {verdict}",
    ]


def size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
