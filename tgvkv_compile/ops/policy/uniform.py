"""Uniform random choice: the baseline that knows nothing."""

import torch

from tgvkv_compile.ops.policy.layer import Layer, Ranked, Ranking

_PRIME = (1 << 31) - 1
_ROUNDS = 4


def uniform(seed: int) -> Ranking:
    """A ranking by pseudo-random numbers of position, layer and `seed`, a non-negative int.

    The same on every device and rank, in every batch and run: a Lehmer generator in int64 whose state is mixed with its own
    upper bits, four rounds.
    """

    def random(layer: Layer) -> Ranked:
        state = (layer.tokens.positions + 2) * 69621 + (layer.number + 1) * 39373 + (seed % _PRIME) * 48271
        for _ in range(_ROUNDS):
            state = (state % _PRIME) * 48271 % _PRIME
            state = state ^ (state >> 15)
        return Ranked((state & ((1 << 24) - 1)).to(torch.float32))

    return random
