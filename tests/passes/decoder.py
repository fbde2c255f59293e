"""A decoder of a few lines with a KV cache and vision features, written in each of the ways that models write attention.

Its graphs are what the passes are tested on: captured by dynamo, or by `torch.export`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.fx.meta import fake_value
from tgvkv_compile.fx.targets import target_name
from tgvkv_compile.passes.rewrite import ArenaSizes, Rewrite
from tgvkv_compile.pipeline import rewrite_graph

IMAGE = 9
VOCABULARY = 10
DIM = 4
SLOTS = 64


def repeat_kv(kv: Tensor, groups: int) -> Tensor:
    """`[B, Hkv, S, D]` to `[B, H, S, D]`, as transformers writes it."""
    batch, heads, length, dim = kv.shape
    if groups == 1:
        return kv
    return kv[:, :, None, :, :].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def flag(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """P1: no mask, `is_causal`."""
    grouped = layer.heads != layer.kv_heads
    is_causal = True if q.shape[2] > 1 else False  # noqa: SIM210 (a symbolic length must not make a symbolic bool)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None, scale=layer.scale, is_causal=is_causal, **({"enable_gqa": True} if grouped else {})
    )


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """P2 and P4: a mask, grouped heads repeated."""
    groups = layer.heads // layer.kv_heads
    return nn.functional.scaled_dot_product_attention(
        q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask, scale=layer.scale, is_causal=False
    )


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """P5: eager attention."""
    groups = layer.heads // layer.kv_heads
    weights = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * layer.scale
    if mask is not None:
        weights = weights + mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=layer.dropout, training=layer.training)
    return torch.matmul(weights, repeat_kv(v, groups))


def softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """A form that no pass knows: logits squashed by tanh."""
    groups = layer.heads // layer.kv_heads
    weights = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * layer.scale
    weights = torch.tanh(weights / 50.0) * 50.0
    weights = nn.functional.softmax(weights, dim=-1)
    return torch.matmul(weights, repeat_kv(v, groups))


def returned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """Eager attention whose probabilities are looked at (`output_attentions=True`)."""
    groups = layer.heads // layer.kv_heads
    weights = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * layer.scale
    weights = nn.functional.softmax(weights, dim=-1)
    layer.probabilities = weights
    return torch.matmul(weights, repeat_kv(v, groups))


def linear(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: "Layer") -> Tensor:
    """No softmax at all."""
    groups = layer.heads // layer.kv_heads
    return torch.matmul(torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)), repeat_kv(v, groups))


class Layer(nn.Module):
    """Attention over a cache, and a residual."""

    def __init__(self, attend: Callable[..., Tensor], heads: int, kv_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend, self.heads, self.kv_heads, self.dropout = attend, heads, kv_heads, dropout
        self.scale = 1.0 / math.sqrt(DIM)
        self.probabilities: Tensor | None = None
        width = heads * DIM
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, kv_heads * DIM), nn.Linear(width, kv_heads * DIM)

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = hidden.shape
        q, k, v = (project(hidden).view(batch, length, -1, DIM).transpose(1, 2) for project in (self.q, self.k, self.v))
        keys, values = self.store(past, k, v)
        out = self.attend(q, keys, values, mask, self)
        return hidden + out.transpose(1, 2).reshape(batch, length, -1), keys, values

    def store(self, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)


class StaticLayer(Layer):
    """Writes into a cache of static size."""

    def store(self, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.arange(k.shape[2])
        return past[0].index_copy_(2, where, k), past[1].index_copy_(2, where, v)


class SlidingLayer(Layer):
    """Attends over everything and keeps the last three."""

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        hidden, keys, values = super().forward(hidden, past, mask)
        return hidden, keys[:, :, -3:], values[:, :, -3:]


class Decoder(nn.Module):
    """Token embeddings with vision features merged in, layers, logits."""

    def __init__(
        self,
        attend: Callable[..., Tensor] = flag,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        kind: type[Layer] | tuple[type[Layer], ...] = Layer,
        probabilities: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = kind if isinstance(kind, tuple) else (kind,) * layers
        width = heads * DIM
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(cls(attend, heads, kv_heads, dropout) for cls in kinds)
        self.head = nn.Linear(width, VOCABULARY)
        self.probabilities = probabilities
        self.eval()

    def forward(
        self,
        ids: Tensor,
        features: Tensor | None = None,
        past: list[tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        hidden = self.embed(ids)
        if features is not None:
            hidden = hidden.masked_scatter((ids == IMAGE).unsqueeze(-1), features)
        return self.decode(hidden, past, mask)

    def decode(self, hidden: Tensor, past: list[tuple[Tensor, Tensor]] | None, mask: Tensor | None) -> Any:
        caches = []
        for index, layer in enumerate(self.layers):
            before = (torch.tensor([]), torch.tensor([])) if past is None else past[index]
            hidden, keys, values = layer(hidden, before, mask)
            caches.append((keys, values))
        if self.probabilities:
            return self.head(hidden), caches, [layer.probabilities for layer in self.layers]
        return self.head(hidden), caches


def tokens(batch: int = 1) -> Tensor:
    """Six tokens before eight image placeholders, five after."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(0, 9, (batch, 6), generator=generator)
    after = torch.randint(0, 9, (batch, 5), generator=generator)
    return torch.cat([before, torch.full((batch, 8), IMAGE), after], dim=1)


def features(batch: int = 1, heads: int = 4) -> Tensor:
    return torch.randn(batch * 8, heads * DIM, generator=torch.Generator().manual_seed(2))


def causal(batch: int, length: int, *, past: int = 0, left: int = 0) -> Tensor:
    """bool `[batch, 1, length, past + length]`; the first `left` columns of sample 0 are padding."""
    mask = torch.ones(length, past + length, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, :left] = False
    return mask


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def full_cache(length: int, *, batch: int = 1, layers: int = 2, kv_heads: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (batch, kv_heads, length, DIM)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(layers)]


def capture(module: nn.Module, *args: Any, dynamic: bool | None = None) -> tuple[GraphModule, list[Any]]:
    """The graph that dynamo makes of a call, with the inputs it is called with."""
    seen: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append((gm, list(inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    ((gm, inputs),) = seen
    return gm, inputs


def pasts(gm: GraphModule) -> frozenset[str]:
    """Names of the inputs that hold the cache."""
    return frozenset(
        node.name
        for node in gm.graph.find_nodes(op="placeholder")
        if getattr(fake_value(node), "ndim", 0) == 4 and "past" in node.name
    )


def rewritten(
    gm: GraphModule,
    inputs: list[Any],
    stop_after: str | None = None,
    *,
    compressed: frozenset[str] = frozenset(),
    config: EvictionConfig | None = None,
    prefill_cap: float | None = None,
) -> Rewrite:
    return rewrite_graph(
        gm,
        inputs,
        compressed,
        config or EvictionConfig(budget=0.4),
        ArenaSizes(SLOTS, 4, prefill_cap),
        stop_after=stop_after,
    )


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value


@torch.no_grad()
def values(gm: GraphModule, inputs: list[Any]) -> dict[str, Any]:
    """What every node of a graph computes."""
    recorder = _Recorder(gm)
    recorder.run(*inputs)
    return recorder.values


def calls(gm: GraphModule) -> list[str]:
    """What the graph calls, in order."""
    return [target_name(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def render(gm: GraphModule, *, prefix: str = "tgvkv") -> str:
    """The nodes whose names start with `prefix`, one line each, shapes included."""
    return "\n".join(_line(node) for node in gm.graph.nodes if node.name.startswith(prefix))


def _line(node: Node) -> str:
    if node.op == "placeholder":
        return f"%{node.name} : {_type(fake_value(node))} = placeholder"
    arguments = [_argument(value) for value in node.args]
    arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    return f"%{node.name} : {_type(fake_value(node))} = {target_name(node)}({', '.join(arguments)})"


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(_argument(item) for item in value)})"
    return repr(value)


def _size(size: Any) -> str:
    return "sym" if isinstance(size, torch.SymInt) else str(size)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"{kind}[{', '.join(_size(size) for size in value.shape)}]"
    return type(value).__name__
