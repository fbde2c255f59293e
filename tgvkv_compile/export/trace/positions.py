"""Rotary positions of prompts with pictures of a known size (Qwen2.5-VL and Qwen3-VL)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def picture_positions(
    ids: Tensor, mask: Tensor, vision_token_ids: Sequence[int], grids: Sequence[Sequence[int]], merge: int
) -> Tensor:
    """Text counts on; a picture's tokens share one time, and have rows and columns; text behind it goes on above the larger.

    Args:
        ids: int64 `[B, N]`.
        mask: int64 `[B, N]`, 0 at padding.
        vision_token_ids: Tokens that stand for pictures.
        grids: Time, height and width in patches of each picture, in the order of the batch.
        merge: Patches along a side of what becomes one token.

    Returns:
        int64 `[3, B, N]`: time, height, width; 0 at padding.
    """
    positions = torch.zeros((3, *ids.shape), dtype=torch.int64)
    vision = torch.isin(ids, torch.tensor(list(vision_token_ids)))
    pictures = iter(grids)
    for sample, row in enumerate(vision):
        places = mask[sample].nonzero()[:, 0].tolist()
        column = following = 0
        while column < len(places):
            if not row[places[column]]:
                positions[:, sample, places[column]] = following
                column, following = column + 1, following + 1
                continue
            time, height, width = next(pictures)
            shape = (time, height // merge, width // merge)
            of_picture = torch.stack(torch.meshgrid(*(torch.arange(length) for length in shape), indexing="ij")).flatten(1)
            count = of_picture.shape[1]
            positions[:, sample, places[column : column + count]] = following + of_picture
            column, following = column + count, following + max(shape[1:])
    return positions
