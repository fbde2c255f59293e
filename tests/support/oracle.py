"""The slow, obvious TGV-KV of one sample: lists, loops and materialised attention.

It is made of the functions that the compiled graphs are made of, but follows the protected suffix by the list of
`docs/algorithm.md`, Decode 3, literally.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.ops.eviction.budgeting import allocate
from tgvkv_compile.ops.eviction.decode import choose_eviction
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.layer import materialised
from tgvkv_compile.ops.policy.rank import TokenRanks, rank_by_walk
from tgvkv_compile.ops.token_types import TokenTypes, classify_tokens, vision_count


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
        self._vision: list[bool] = []  # of every position that a prompt or turn brought; what follows is text
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
        token_types = classify_tokens(vision.unsqueeze(0), None)
        ranks = [self._ranks(layer, paid, visible, token_types) for layer, paid in enumerate(attention)]
        masses = torch.stack([one.mass for one in ranks], dim=1)
        allocation = allocate(masses, token_types.lengths, vision_count(token_types, config=self.config), config=self.config)
        keeps = [
            select_tokens(one.score, one.tier, token_types, allocation.kept[:, layer], sink_tokens=self.config.sink_tokens)
            for layer, one in enumerate(ranks)
        ]
        question = token_types.question[0].tolist()
        self.mass, self.rate = masses[0], allocation.rate[0]
        self.kept = [_indices(keep[0]) for keep in keeps]
        self._protected = [[position for position in kept if question[position]] for kept in self.kept]
        self.suffix = [len(protected) for protected in self._protected]
        self._vision = vision.tolist()
        self._totals = [length] * len(self.kept)
        self._generated = [0] * len(self.kept)

    def hold(self, layers: int, length: int) -> None:
        """Takes text in that was attended to in full and never evicted: turns before the first with vision."""
        self.kept = [list(range(length)) for _ in range(layers)]
        self.rate, self.mass = torch.ones(layers), torch.zeros(layers)
        self._vision, self._totals = [False] * length, [length] * layers
        self._protected, self.suffix, self._generated = [[] for _ in range(layers)], [0] * layers, [0] * layers

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

    def extend_with_vision(self, attention: Sequence[Tensor], vision: Tensor, visible: Tensor | None = None) -> None:
        """Takes a continuation with new vision in: budgeting runs again over survivors and new tokens.

        Args:
            attention: Per layer `[H, Q, W + Q]` or `[Q, W + Q]` float32 probabilities of the `Q` new tokens on the `W`
                positions that the layer keeps and on each other.
            vision: `[Q]` bool.
            visible: `[Q, Q]` bool, new row sees new column; causal by default.
        """
        count = vision.shape[0]
        if not bool(vision.any()):
            return self.extend(count)
        total = self._totals[0]
        self._vision += [False] * (total - len(self._vision)) + vision.tolist()
        if visible is None:
            visible = torch.ones(count, count, dtype=torch.bool).tril()
        everything = classify_tokens(torch.tensor([self._vision]), None)  # as if this were one prompt; what is gone as well
        found, candidates = [], []
        for layer, kept in enumerate(self.kept):
            positions = torch.tensor([*kept, *range(total, total + count)])
            # `R` and the last position are the whole prompt's: no text before the new vision is in the question.
            valid, vision_there, asking, there = (part[:, positions] for part in everything[:4])
            token_types = TokenTypes(valid, vision_there, asking, there, everything.lengths)
            paid = attention[layer].mean(0) if attention[layer].dim() == 3 else attention[layer]
            sees = torch.cat([torch.ones(count, len(kept), dtype=torch.bool), visible], dim=1)
            found.append(self._ranks(layer, paid, sees, token_types))
            candidates.append(token_types)
        numbers = vision_count(everything, config=self.config)
        masses = torch.stack([ranks.mass for ranks in found], dim=1)
        allocation = allocate(masses, everything.lengths, numbers, config=self.config)
        question = everything.question[0].tolist()
        for layer, (ranks, token_types) in enumerate(zip(found, candidates, strict=True)):
            number = allocation.kept[:, layer].clamp(max=token_types.positions.shape[1])
            keep = select_tokens(ranks.score, ranks.tier, token_types, number, sink_tokens=self.config.sink_tokens)
            self.kept[layer] = token_types.positions[keep].tolist()
            self._protected[layer] = [position for position in self.kept[layer] if question[position]]
            self.suffix[layer] = len(self._protected[layer])
            self._totals[layer] = total + count
            self._generated[layer] = 0
        self.mass, self.rate = masses[0], allocation.rate[0]

    def _ranks(self, layer: int, attention: Tensor, visible: Tensor, token_types: TokenTypes) -> TokenRanks:
        """Of `attention [R, S]` and `visible [R, S]`."""
        walk = materialised(attention.unsqueeze(0), visible.unsqueeze(0))
        no_keys = attention.new_empty((1, 0, attention.shape[1], 0))
        return rank_by_walk(no_keys, token_types, attention.shape[0], walk, layer=layer, **self.config.for_ranking())

    def crop(self, length: int) -> None:
        """Takes the tokens at positions `length` (at least 1) and later back; what was evicted meanwhile stays evicted.

        The rates stay, and so does the size of the protected suffix, as far as there are entries.
        """
        for layer, kept in enumerate(self.kept):
            self.kept[layer] = [position for position in kept if position < length]
            self._protected[layer] = self.kept[layer][-self.suffix[layer] :]
            self.suffix[layer] = len(self._protected[layer])
            self._totals[layer] = min(self._totals[layer], length)
            self._generated[layer] = 0
        self._vision = self._vision[:length]


def _indices(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero().flatten()]
