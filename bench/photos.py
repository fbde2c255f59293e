"""Requests about pictures of different sizes, as Qwen2.5-VL's processor gives them: patches, their grid, and the prompt."""

import torch
from torch import Tensor

from bench.models import FIRST_TEXT, IMAGE_TOKEN, PATCH, VISION_END, VISION_START
from bench.presets import Preset

MERGE = 2
"""Patches along each side of what becomes one vision token."""
FRAMES = 2
"""A picture is put in twice, as if it were a video's two frames."""
PAD = 0
GREETING = 12
"""Tokens of text before a picture: system prompt and role."""
MOST = 143
"""How many sizes there are."""

Grid = tuple[int, int]
"""Rows and columns of vision tokens; a picture's sides are `PATCH * MERGE` times as many pixels."""


def grids(count: int) -> list[Grid]:
    """The sizes of the first `count` pictures, no two the same: from 336 to 672 pixels a side.

    Sides go round lists of 11 and 13 entries, so that sizes come back after `MOST` pictures.
    """
    return [(12 + 3 * number % 11, 12 + 5 * number % 13) for number in range(count)]


def request(preset: Preset, sizes: list[Grid], number: int) -> dict[str, Tensor]:
    """What `generate` is called with: a batch padded on the left, one picture and one question per sample.

    Args:
        preset: Of the model.
        sizes: Of the samples' pictures.
        number: Of the request; text and pixels differ between requests, and how long the question is.
    """
    generator = torch.Generator().manual_seed(1 + number)
    rows = []
    for place, (height, width) in enumerate(sizes):
        asked = 16 + (7 * number + 5 * place) % 17
        text = torch.randint(FIRST_TEXT, preset.vocabulary, (GREETING + asked,), generator=generator).tolist()
        seen = [VISION_START, *[IMAGE_TOKEN] * (height * width), VISION_END]
        rows.append([*text[:GREETING], *seen, *text[GREETING:]])
    length = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    patches = sum(MERGE**2 * height * width for height, width in sizes)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(patches, 3 * FRAMES * PATCH**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, MERGE * height, MERGE * width] for height, width in sizes]),
    }


def requests(preset: Preset, count: int, batch: int) -> list[dict[str, Tensor]]:
    """`count` of them; the pictures of a batch are of the next sizes of the list, too."""
    sizes = grids(count)
    return [request(preset, [sizes[(number + place) % count] for place in range(batch)], number) for number in range(count)]
