"""The attention of one call, computed some rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.ops.attention.masks import visible as seen_by_mask
from tgvkv_compile.ops.attention.probabilities import attention_probabilities, known_normaliser


class AttentionRows(NamedTuple):
    """The attention of one call, to be computed.

    Attributes:
        q: `[B, H, R, D]`, the queries of the last `R` columns.
        k: `[B, Hkv, S, D]`.
        valid: bool `[B, S]`; padding is neither seen nor counted, whatever the mask says.
        attn_mask: `[B | 1, 1 | H, R, S]`, bool (True is visible) or additive (visible where above half of the lowest finite
            value); None if there is none.
        is_causal: Whether rows see no later column, besides what the mask says; only where `R` is `S`.
        scale: The factor on the logits.
        lse: float32 `[B, H, R]`, the log-sum-exp of each row's visible logits; None where attention does not give it.
    """

    q: Tensor
    k: Tensor
    valid: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    lse: Tensor | None = None

    def wanted(self, columns: Tensor | None) -> Tensor:
        """Bool `[B, S]`: of `columns` (None: all) those that are valid."""
        return self.valid if columns is None else columns & self.valid

    def attention(self, start: int, end: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Head-mean attention and visibility of rows `start … end - 1`, both `[B, R, C]`.

        Args:
            start: First row.
            end: One past the last row.
            columns: int64 `[C]`, the keys wanted, if the normaliser is known; None: all that such rows may see.
        """
        keys = end if self.is_causal else self.k.shape[2]
        chosen = torch.arange(keys, device=self.k.device) if columns is None else columns
        k = self.k[:, :, :keys] if columns is None else self.k.index_select(2, columns)
        visible = self._visible(start, end, chosen)
        rows = self.q[:, :, start:end]
        if self.lse is None:
            attention = attention_probabilities(rows, k, visible, self.scale)
        else:
            attention = known_normaliser(rows, k, visible, self.lse[:, :, start:end], self.scale)
        return attention.mean(1), visible.any(1)

    def _visible(self, start: int, end: int, columns: Tensor) -> Tensor:
        """Which of the keys `columns [C]` the rows `start … end - 1` see: `[B, 1 | H, R, C]` bool."""
        visible = self.valid[:, None, None, columns].expand(-1, 1, end - start, -1)
        if self.is_causal:
            row = torch.arange(start, end, device=self.valid.device)
            visible = visible & (row.unsqueeze(1) >= columns)
        if self.attn_mask is not None:
            visible = visible & seen_by_mask(self.attn_mask[:, :, start:end].index_select(3, columns))
        return visible
