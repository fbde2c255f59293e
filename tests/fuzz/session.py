"""The reference session with the rest of what can be done to a cache: padded turns, crop, other samples."""

import copy
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle import Oracle
from tests.support.reference import Session


class FuzzSession(Session):
    """A `Session` whose cache can be cropped and reordered, and whose later turns may be padded."""

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        self._new = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].sum(1).tolist()
        return super().call(inputs)

    def crop(self, tokens: int) -> None:
        """Takes back the last `tokens` columns. What was evicted stays gone; the protected suffix keeps its size."""
        self._cache.crop(-tokens)
        self._valid = self._valid[:, :-tokens]
        if not self.dense:
            for sample, oracles in enumerate(zip(self._oracles, *zip(*self._twins, strict=True), strict=True)):
                for oracle in oracles:
                    _crop(oracle, int(self._valid[sample].sum()))

    def select(self, indices: list[int]) -> None:
        """Goes on with the samples `indices`."""
        self._cache.batch_select_indices(torch.tensor(indices))
        self._valid = self._valid[indices]
        self.fragile = [self.fragile[index] for index in indices]
        if not self.dense:
            self._oracles = [copy.deepcopy(self._oracles[index]) for index in indices]
            self._twins = [copy.deepcopy(self._twins[index]) for index in indices]

    def _all_oracles(self) -> list[Any]:
        return [
            _Padded(oracle, count)
            for oracle, twins, count in zip(self._oracles, self._twins, self._new, strict=True)
            for oracle in (oracle, *twins)
        ]


class _Padded:
    """An oracle that is extended by its sample's own tokens."""

    def __init__(self, oracle: Oracle, count: int) -> None:
        self._oracle, self._count = oracle, count

    def extend(self, _: int) -> None:
        self._oracle.extend(self._count)


def _crop(oracle: Oracle, length: int) -> None:
    for layer, kept in enumerate(oracle.kept):
        suffix = len(oracle._protected[layer]) - oracle._generated[layer]
        left = [position for position in kept if position < length]
        oracle.kept[layer] = left
        oracle._protected[layer] = left[-suffix:] or [-1]
        oracle._generated[layer] = 0
        oracle._totals[layer] = length
