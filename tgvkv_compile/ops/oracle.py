"""The slow, obvious TGV-KV of one sample: lists, loops and materialised attention.

It is made of the functions that the compiled graphs are made of, but follows the protected suffix by the list of
`docs/algorithm.md`, Decode 3, literally.
"""

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.budgeting import allocate
from tgvkv_compile.ops.decoding import choose_eviction
from tgvkv_compile.ops.retention import retain
from tgvkv_compile.ops.roles import token_roles, vision_count
from tgvkv_compile.ops.scoring import scores_from_attention


class Oracle:
    """Which positions each layer keeps, after prefill and after each decode step.

    A sample without vision is treated as one of a batch in which others have some.

    Attributes:
        kept: Positions that each layer holds now, sorted.
        suffix: `P_l`, how many entries each layer protects at the end.
        mass: `[L]` float32, `m_l`.
        rate: `[L]` float32, `r_l`.
    """

    def __init__(self, config: EvictionConfig) -> None:
        """Makes an oracle that has seen no prompt yet."""
        self.config = config
        self.kept: list[list[int]] = []
        self.suffix: list[int] = []
        self.mass = torch.empty(0)
        self.rate = torch.empty(0)
        self._totals: list[int] = []  # N + t, per layer
        self._protected: list[list[int]] = []  # the list of Decode 3, as far as it exists
        self._generated: list[int] = []  # t, since prefill or the last continuation

    def prefill(self, attention: Tensor, vision: Tensor, visible: Tensor | None = None) -> None:
        """Takes the prompt in.

        Args:
            attention: `[L, H, N, N]` or `[L, N, N]` float32 probabilities.
            vision: `[N]` bool.
            visible: `[N, N]` bool, row sees column; causal by default.
        """
        if attention.dim() == 4:
            attention = attention.mean(1)
        length = vision.shape[0]
        if visible is None:
            visible = torch.ones(length, length, dtype=torch.bool).tril()
        roles = token_roles(vision.unsqueeze(0), None)
        scored = [scores_from_attention(layer.unsqueeze(0), visible.unsqueeze(0), roles) for layer in attention]
        masses = torch.stack([mass for mass, _ in scored], dim=1)
        allocation = allocate(masses, roles.lengths, vision_count(roles, config=self.config), config=self.config)
        keeps = [
            retain(score, roles, allocation.kept[:, layer], sink_tokens=self.config.sink_tokens)
            for layer, (_, score) in enumerate(scored)
        ]
        question = roles.question[0].tolist()
        self.mass, self.rate = masses[0], allocation.rate[0]
        self.kept = [_indices(keep[0]) for keep in keeps]
        self._protected = [[position for position in kept if question[position]] for kept in self.kept]
        self.suffix = [len(protected) for protected in self._protected]
        self._totals = [length] * len(self.kept)
        self._generated = [0] * len(self.kept)

    def attended(self, layer: int) -> list[int]:
        """Positions that the next step of `layer` attends to: all kept, then the new token."""
        return [*self.kept[layer], self._totals[layer]]

    def decode(self, layer: int, attention: Tensor) -> None:
        """Takes one generated token in.

        Args:
            layer: Which layer.
            attention: `[len(kept[layer]) + 1]` float32, the step's head-mean attention to `attended(layer)`.
        """
        positions = self.attended(layer)
        self._protected[layer].append(self._totals[layer])
        self._totals[layer] += 1
        self._generated[layer] += 1
        protect_from = self._protected[layer][self._generated[layer]]
        evicted = choose_eviction(
            attention.unsqueeze(0),
            torch.tensor([positions]),
            torch.tensor([len(positions)]),
            torch.tensor([self._totals[layer]]),
            self.rate[layer : layer + 1],
            torch.tensor([protect_from]),
            config=self.config,
        )
        index = int(evicted)
        if index >= 0:
            del positions[index]
        self.kept[layer] = positions

    def extend(self, count: int) -> None:
        """Takes a continuation of `count` text tokens in: all are kept and become the protected suffix."""
        for layer, total in enumerate(self._totals):
            new = list(range(total, total + count))
            self.kept[layer] = self.kept[layer] + new
            self._protected[layer] = new
            self._totals[layer] = total + count
            self._generated[layer] = 0
            self.suffix[layer] = count


def _indices(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero().flatten()]
