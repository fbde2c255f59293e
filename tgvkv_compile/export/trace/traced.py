"""The two calls of a model that an engine makes, as `torch.export` traces them: nothing of eviction is in them yet."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tgvkv_compile.errors import UnsupportedGraphError, first_line
from tgvkv_compile.export.trace.families import FEATURES, IDS, MASK, PIXELS, POSITIONS, Family, features_given
from tgvkv_compile.ops.token_types import prefix_count
from tgvkv_compile.passes.drop_assertions import drop_assertions
from tgvkv_compile.runtime.inspect import CACHE_NAMES

_PAST = 8  # entries of the cache that a decode step is traced on; what is traced does not depend on it


class _Prefill(torch.nn.Module):
    """`(input_ids, attention_mask, the family's tensors ...) -> (logits [B, vocabulary], keys, values, keys, ...)`."""

    def __init__(self, model: Any, family: Family, names: Sequence[str], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.family, self.names, self.constants = family, tuple(names), dict(constants)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        own = (prefix_count(given[MASK] != 0) - 1.0).clamp(min=0.0).to(torch.int64)
        called = {name: given[name] for name in (IDS, MASK)}
        called[POSITIONS] = own
        if self.family.position_rows:
            called[POSITIONS] = torch.cat([own[None], given[POSITIONS]])
        stand_in: Any = contextlib.nullcontext()
        if self.family.from_features:
            features = {name: value for name, value in given.items() if name not in (IDS, MASK, POSITIONS)}
            called[PIXELS] = features[FEATURES]
            stand_in = features_given(self.model, lambda: features)
        else:
            called.update({name: given[name] for name in self.family.tensors}, **self.constants)
        with stand_in:
            output = self.model(**called, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], *_entries(output)


class _Decode(torch.nn.Module):
    """`(token [B, 1], position [B, 1], keys, values, keys, ...) -> (logits [B, vocabulary], keys, values, keys, ...)`."""

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.cache_name = next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)

    def forward(self, token: Tensor, position: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        rows = self.family.position_rows
        positions = position.expand(1 + rows, -1, -1) if rows else position
        output = self.model(
            input_ids=token, position_ids=positions, **{self.cache_name: cache}, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1], *_entries(output)


def _entries(output: Any) -> tuple[Tensor, ...]:
    cache = next(cache for name in CACHE_NAMES if (cache := getattr(output, name, None)) is not None)
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def traced_prefill(
    model: Any,
    family: Family,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Any],
    shapes: Sequence[dict[int, Any] | None],
) -> GraphModule:
    """The prefill as a flat graph, its inputs named as `inputs` are.

    Args:
        model: In eval mode.
        family: Its family.
        inputs: Of `engine_inputs`.
        constants: Of `constants_of`.
        shapes: Which dimension of which input is dynamic, as `torch.export.export` takes it.

    Raises:
        UnsupportedGraphError: It cannot be traced.
    """
    call = _Prefill(model, family, tuple(inputs), constants)
    # `AUTO`: a named dimension would have to satisfy guards of grouped heads that torch cannot prove for all lengths. The
    # rewritten graph has none of them, and is exported with the dimension itself.
    free = tuple(None if shape is None else dict.fromkeys(shape, torch.export.Dim.AUTO) for shape in shapes)
    return _traced(call, tuple(inputs.values()), (free,), tuple(inputs))


def traced_decode(
    model: Any, family: Family, like: Sequence[Tensor], *, growing: bool = False
) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """A decode step as a flat graph of `token`, `position`, `past_key_0`, `past_value_0`, ..., and its example inputs.

    Args:
        model: In eval mode.
        family: Its family.
        like: Keys and values of every layer in turn, `[B, Hkv, N, D]`, of whatever `N`; may be fake.
        growing: Whether the past may have any length, for a graph that is not rewritten and returns it joined.
    """
    batch, device = like[0].shape[0], like[0].device
    past = [torch.zeros((batch, entry.shape[1], _PAST, entry.shape[3]), dtype=entry.dtype, device=device) for entry in like]
    names = [f"past_{part}_{layer}" for layer in range(len(past) // 2) for part in ("key", "value")]
    # Two tensors: the same one twice would be traced as one input.
    ids = [torch.zeros((batch, 1), dtype=torch.int64, device=device) for _ in range(2)]
    inputs = (*ids, *past)
    shapes = (None, None, tuple({2: torch.export.Dim.AUTO} for _ in past)) if growing else None
    return _traced(_Decode(model, family), inputs, shapes, ("token", "position", *names)), inputs


def _traced(module: torch.nn.Module, inputs: tuple[Tensor, ...], shapes: Any, names: Sequence[str]) -> GraphModule:
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            drop_assertions(program.graph_module)  # torch 2.11 cannot trace them a second time
            program = program.run_decompositions({})  # nothing is written in place any more
    except Exception as error:  # torch.export has no common class of errors for what it cannot trace
        raise UnsupportedGraphError(f"torch.export cannot trace this model: {first_line(error)}") from error
    unlifted = program.module()
    assert isinstance(unlifted, GraphModule)
    graph = unlifted.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = node.name = name
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # a view relied on strides that the rewritten attention does not have
    return GraphModule(unlifted, graph)  # without the hooks that check the inputs as they were
