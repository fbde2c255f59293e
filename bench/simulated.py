"""Attention of a stock model to a cache as a scheme would hold it.

The model's cache stays whole and in float32. Whenever tokens behind the prompt attend to it, all of it is quantised and read
again first. That is what a cache gives that holds codes: each token's are made of its own key and value. Tokens behind the
prompt may come all at once, since each sees those before it and itself.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from bench.schemes import Scheme
from tgvkv_compile.ops.cache.quantising import rotated

_NAME = "bench_simulated"


class Simulation:
    """A model whose prompt's cache is computed once, and whose next tokens see it as one scheme after the other leaves it.

    Args:
        model: A LLaVA, uncompiled, in float32; its attention is replaced.
        inputs: A prompt of one sample, not padded.
        forced: int64 `[F]`, the tokens that follow.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], forced: Tensor) -> None:
        self._model, self._forced = model, forced
        self._prompt = inputs["input_ids"].shape[1]
        self._scheme: Scheme | None = None
        model.set_attn_implementation({"text_config": "sdpa"})
        self._cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

    def say(self, scheme: Scheme | None) -> Tensor:
        """Log-probabilities float32 `[F, vocabulary]` of what follows each token; None: the full cache's."""
        self._scheme = scheme
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                module.simulation = self
        self._model.set_attn_implementation({"text_config": _NAME})
        positions = torch.arange(self._prompt, self._prompt + len(self._forced))[None]
        given = {"input_ids": self._forced[None], "position_ids": positions, "past_key_values": copy.deepcopy(self._cache)}
        return self._model(**given, use_cache=True).logits[0].float().log_softmax(-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`query [1, H, Q, D]`, of the last tokens, to the whole `key`, `value` `[1, Hkv, S, D]`; `[1, Q, H, D]`."""
        at = torch.arange(key.shape[2])
        queries = at[-query.shape[2] :, None]
        group = query.shape[1] // key.shape[1]

        def logits(keys: Tensor) -> Tensor:
            return query @ keys.repeat_interleave(group, dim=1).mT * scale

        better = torch.ones(len(queries), len(at), dtype=torch.bool)
        if self._scheme is None:
            seen = logits(key)
            read = value
        else:
            read_key, read = self.read(key, value)
            better = (at < self._scheme.sinks) | (queries - at < self._scheme.newest)
            value, key = (self._scheme.better(held, self._prompt) for held in (value, key))
            seen = torch.where(better, logits(key), logits(read_key))
        shares = seen.masked_fill(at > queries, float("-inf")).softmax(-1)
        output = (shares * better) @ value.repeat_interleave(group, dim=1)
        output += (shares * ~better) @ read.repeat_interleave(group, dim=1)
        return output.transpose(1, 2)

    def read(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come back from the scheme's cache."""
        scheme = self._scheme
        assert scheme is not None
        # Taken off all keys, this is taken off all logits of a query, and no share changes. So it may stay whole.
        centre = key[:, :, : self._prompt].mean(2, keepdim=True) if scheme.centred else 0.0
        turn_key = rotated if "k" in scheme.turned else _same
        turn_value = rotated if "v" in scheme.turned else _same
        read_key = turn_key(scheme.key(turn_key(key - centre), self._prompt)) + centre
        return read_key, turn_value(scheme.value(turn_value(value), self._prompt))


def _same(values: Tensor) -> Tensor:
    return values


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    simulation: Simulation = module.simulation
    return simulation.attend(query, key, value, scaling), None


AttentionInterface.register(_NAME, _attention)
