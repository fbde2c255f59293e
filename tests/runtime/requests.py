"""Requests to a compiled decoder of a few lines, and its cache in the containers that users hold."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.passes.decoder import Decoder, features, flag, tokens
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.runtime.logical import LogicalKV

Pairs = list[tuple[Tensor, Tensor]]


def compiled(budget: float | int = 0.4, *, attend: Any = flag, **options: Any) -> Decoder:
    model = Decoder(attend)
    model.compile(backend=tgvkv_backend(budget, lowering="eager", **options))
    return model


@torch.no_grad()
def prefill(model: Decoder, batch: int = 1) -> Pairs:
    _, caches = model(tokens(batch), features(batch))
    return caches


@torch.no_grad()
def step(model: Decoder, caches: Pairs, token: int = 3) -> tuple[Tensor, Pairs]:
    """Logits `[B, vocabulary]` of one more token, and the cache after it."""
    batch = caches[0][0].shape[0]
    logits, after = model(torch.full((batch, 1), token), None, caches)
    return logits[:, -1], after


@torch.no_grad()
def turn(model: Decoder, caches: Pairs, *, picture: bool, count: int = 5) -> tuple[Tensor, Pairs]:
    """Logits `[B, vocabulary]` of a later turn: `count` text tokens, or the prompt of `prefill` once more."""
    batch = caches[0][0].shape[0]
    ids = tokens(batch) if picture else tokens(batch)[:, :count]
    logits, after = model(ids, features(batch) if picture else None, caches)
    return logits[:, -1], after


def handles(caches: Pairs) -> list[LogicalKV]:
    flat = [tensor for pair in caches for tensor in pair]
    assert all(isinstance(handle, LogicalKV) for handle in flat)
    return flat  # type: ignore[return-value]


def in_cache(caches: Pairs) -> Any:
    """As a `DynamicCache`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(caches):
        # `update` would join them to an empty tensor.
        cache.layers.append(cache.layer_class_to_replicate())
        cache.layers[layer].lazy_initialization(torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1))
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    return cache


def pairs(cache: Any) -> Pairs:
    return [(layer.keys, layer.values) for layer in cache.layers]


def kept(caches: Pairs) -> list[list[list[int]]]:
    """Positions per sample and layer."""
    from tgvkv_compile.runtime.compact import kept_positions

    compact = handles(caches)[0].compact
    return [
        [kept_positions(compact.state, layer, sample).tolist() for layer in range(len(caches))]
        for sample in range(compact.batch)
    ]
