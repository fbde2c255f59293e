"""Custom op `tgvkv::merged`: says in a graph which of the embeddings that the decoder is handed are vision."""

from typing import cast

import torch
from torch import Tensor, library

library.define("tgvkv::merged", "(Tensor embeds, Tensor? vision) -> Tensor")


def _merged(embeds: Tensor, vision: Tensor | None) -> Tensor:
    return embeds.clone()  # an op's result may not be its input; graphs of ours hold no such node when they run


SPELLINGS = (torch.ops.tgvkv.merged, torch.ops.tgvkv.merged.default)
"""How graphs call it."""

library.impl("tgvkv::merged", "CompositeExplicitAutograd", _merged)


@library.register_fake("tgvkv::merged")  # type: ignore[untyped-decorator]
def _(embeds: Tensor, vision: Tensor | None) -> Tensor:
    return torch.empty_like(embeds)


def merged(embeds: Tensor, vision: Tensor | None) -> Tensor:
    """The embeddings as they are.

    Args:
        embeds: `[B, N, hidden]`, embeddings of the prompt's tokens, vision features in the places of vision tokens.
        vision: bool `[B, N, 1]`, where they are; None: all of them are text.
    """
    return cast(Tensor, torch.ops.tgvkv.merged(embeds, vision))
