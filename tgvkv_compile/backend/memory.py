"""`memory=`: the tokens per layer that fit into some bytes of one sample."""

import dataclasses

import torch
from torch import Tensor

from tgvkv_compile.backend.options import BackendOptions
from tgvkv_compile.config import KVDtype
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.fx.meta import fake_tensor
from tgvkv_compile.ops.cache.rows import KVForms
from tgvkv_compile.ops.cache.window import window_bound
from tgvkv_compile.plan import GraphPlan


def forms_of(plan: GraphPlan, options: BackendOptions) -> KVForms:
    """What rows of a cache look like that a graph of this plan makes."""
    site = plan.sites[0]
    return KVForms.of(fake_tensor(site.key.node), fake_tensor(site.value.node), options.kv_dtype)


def with_budget(options: BackendOptions, plan: GraphPlan) -> BackendOptions:
    """The options with a budget in place of `memory`: tokens per layer, for the layers, heads and `kv_dtype` of this model.

    Args:
        options: As given; returned as they are where they have a budget.
        plan: Of a graph that has a compact cache.

    Raises:
        ConfigError: Not even the first tokens and the newest would fit.
    """
    if options.memory is None:
        return options
    heads = int(fake_tensor(plan.sites[0].key.node).shape[1])
    token = plan.num_layers * heads * forms_of(plan, options).bytes
    tokens, least = tokens_within(int(options.memory), token, options.kv_dtype), options.sink_tokens + 1
    if tokens < least:
        needed = least * token
        while tokens_within(needed, token, options.kv_dtype) < least:
            needed += token
        raise ConfigError(
            f"memory={options.memory} bytes hold {tokens} tokens of this model ({token} bytes each, in all {plan.num_layers} "
            f"layers), but the first {options.sink_tokens} and the newest are always kept; give at least "
            f"{needed} bytes"
        )
    return dataclasses.replace(options, budget=tokens, memory=None)


def tokens_within(memory: int, token: int, kv_dtype: KVDtype | None) -> int:
    """How many tokens of each layer fit.

    Args:
        memory: Bytes.
        token: Bytes of a token in all layers.
        kv_dtype: How they are held; a window takes its share.
    """
    room = memory // token
    return next((n for n in range(room, 0, -1) if n + window_bound(n, 1, kv_dtype) <= room), 0)


def check_question(options: BackendOptions, asked: int | str | None, history: Tensor, lengths: Tensor) -> None:
    """Raises where the memory that was asked for has no room for the question; reads the device, so only where it was.

    Args:
        options: With a budget, of [`with_budget`][].
        asked: The bytes that were asked for; None: none, and nothing is checked.
        history: bool `[B, P]`, which positions are vision.
        lengths: int64 `[B]`, tokens of each sample.

    Raises:
        ConfigError: The sinks and the question of a sample with vision are more tokens than fit.
    """
    if asked is None:
        return
    place = torch.arange(1, history.shape[1] + 1, device=history.device)
    last = torch.where(history, place, 0).amax(1)
    wanted = torch.where(last > 0, lengths - last + options.sink_tokens, 0)
    most, sample = wanted.max(0)
    if int(most) > options.limit:
        raise ConfigError(
            f"memory={asked} bytes hold {options.limit} tokens per layer, but the question of sample {int(sample)} and the "
            f"first {options.sink_tokens} tokens are {int(most)}; give more memory, or a kv_dtype that takes less"
        )
