"""What processors make of a picture or a video, and the tokens that they put in its place."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.families.family import CLOSE, COLUMN, FAKE, IMAGE, OPEN, ROW, VIDEO, Media

SIDE = 16  # pixels
PATCH = 4
IN_PATCH = 3 * 2 * PATCH**2  # numbers in a patch of two frames


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# Pictures


def square(generator: torch.Generator) -> Media:
    return {"pixel_values": pixels(generator, 1, 3, SIDE, SIDE)}


def tile(generator: torch.Generator) -> Media:
    """A picture of which the processor makes one tile; of larger ones it makes several, and all are encoded alike."""
    return square(generator)


def square_as_image(generator: torch.Generator) -> Media:
    """For video_llava, which names its inputs by kind."""
    return {"pixel_values_images": pixels(generator, 1, 3, SIDE, SIDE)}


def large_square(generator: torch.Generator) -> Media:
    """For got_ocr2, which makes one token of 4 by 4 patches."""
    return {"pixel_values": pixels(generator, 1, 3, 4 * SIDE, 4 * SIDE)}


def tiled(generator: torch.Generator) -> Media:
    """A picture of 16 by 32 pixels: one tile of the whole and two of its halves; the others are a batch's padding."""
    tiles = pixels(generator, 1, 5, 3, SIDE, SIDE)
    tiles[:, 3:] = 0
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[SIDE, 2 * SIDE]])}


def sized(generator: torch.Generator) -> Media:
    """Pixtral: 4 by 6 patches."""
    return {"pixel_values": pixels(generator, 1, 3, SIDE, 24), "image_sizes": torch.tensor([[SIDE, 24]])}


def grid(generator: torch.Generator) -> Media:
    """Qwen: 4 by 8 patches, or 8 by 4."""
    height, width = (4, 8) if torch.rand((), generator=generator) < 0.5 else (8, 4)
    return {"pixel_values": pixels(generator, 32, IN_PATCH), "image_grid_thw": torch.tensor([[1, height, width]])}


def grid_of_patches(generator: torch.Generator) -> Media:
    """For paddleocr_vl."""
    return {"pixel_values": pixels(generator, 32, 3, PATCH, PATCH), "image_grid_thw": torch.tensor([[1, 4, 8]])}


def grid_to_merge(generator: torch.Generator) -> Media:
    """For video_llama_3, which says per picture how many patches become a token."""
    grid_thw, merge = torch.tensor([[1, 4, 4]]), torch.tensor([1])
    return {"pixel_values": pixels(generator, 16, 3 * PATCH**2), "image_grid_thw": grid_thw, "image_merge_sizes": merge}


def masked(generator: torch.Generator) -> Media:
    """Idefics."""
    return of_masked(1)(generator)


def masked_for_aria(generator: torch.Generator) -> Media:
    return of_masked_for_aria(1)(generator)


def packed(generator: torch.Generator) -> Media:
    """Siglip 2: a list of patches and its shape."""
    return of_shape(4, 4)(generator)


# Pictures and videos of other sizes


def tiled_tall(generator: torch.Generator) -> Media:
    """A picture of 32 by 16 pixels, not all of it used: unpadding leaves out rows."""
    return {**tiled(generator), "image_sizes": torch.tensor([[2 * SIDE, SIDE - 4]])}


def tiled_square(generator: torch.Generator) -> Media:
    """A picture of 32 by 32 pixels: one tile of the whole and four of its quarters."""
    return {"pixel_values": pixels(generator, 1, 5, 3, SIDE, SIDE), "image_sizes": torch.tensor([[2 * SIDE, 2 * SIDE]])}


def tiled_wide(generator: torch.Generator) -> Media:
    return {**tiled(generator), "image_sizes": torch.tensor([[SIDE - 6, 2 * SIDE]])}


def of_tiles(count: int, side: int = SIDE) -> Callable[[torch.Generator], Media]:
    """A picture cut into `count` tiles."""
    return lambda generator: {"pixel_values": pixels(generator, count, 3, side, side)}


def of_masked(count: int) -> Callable[[torch.Generator], Media]:
    """Idefics: `count` tiles."""

    def make(generator: torch.Generator) -> Media:
        mask = torch.ones(count, SIDE, SIDE, dtype=torch.int64)
        return {"pixel_values": pixels(generator, count, 3, SIDE, SIDE), "pixel_attention_mask": mask}

    return make


def of_masked_for_aria(count: int) -> Callable[[torch.Generator], Media]:
    """For aria, which names the mask otherwise."""

    def make(generator: torch.Generator) -> Media:
        mask = torch.ones(count, SIDE, SIDE, dtype=torch.bool)
        return {"pixel_values": pixels(generator, count, 3, SIDE, SIDE), "pixel_mask": mask}

    return make


def of_size(height: int, width: int) -> Callable[[torch.Generator], Media]:
    """Pixtral: `height` by `width` pixels."""

    def make(generator: torch.Generator) -> Media:
        size = torch.tensor([[height, width]])
        return {"pixel_values": pixels(generator, 1, 3, height, width), "image_sizes": size}

    return make


def of_shape(height: int, width: int) -> Callable[[torch.Generator], Media]:
    """Siglip 2: `height` by `width` patches, padded to 16."""

    def make(generator: torch.Generator) -> Media:
        mask = (torch.arange(16) < height * width).long()[None]
        values = pixels(generator, 1, 16, 3 * PATCH**2) * mask[..., None]
        return {"pixel_values": values, "spatial_shapes": torch.tensor([[height, width]]), "pixel_attention_mask": mask}

    return make


def of_grid(height: int, width: int) -> Callable[[torch.Generator], Media]:
    """Qwen: `height` by `width` patches."""

    def make(generator: torch.Generator) -> Media:
        values = pixels(generator, height * width, IN_PATCH)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]])}

    return make


def of_patches(height: int, width: int) -> Callable[[torch.Generator], Media]:
    """For paddleocr_vl."""

    def make(generator: torch.Generator) -> Media:
        values = pixels(generator, height * width, 3, PATCH, PATCH)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]])}

    return make


def to_merge(height: int, width: int) -> Callable[[torch.Generator], Media]:
    """For video_llama_3."""

    def make(generator: torch.Generator) -> Media:
        values = pixels(generator, height * width, 3 * PATCH**2)
        grid_thw = torch.tensor([[1, height, width]])
        return {"pixel_values": values, "image_grid_thw": grid_thw, "image_merge_sizes": torch.tensor([1])}

    return make


def of_frames(count: int) -> Callable[[torch.Generator], Media]:
    """For llava's videos."""
    return lambda generator: {"pixel_values_videos": pixels(generator, 1, count, 3, SIDE, SIDE)}


def of_times(count: int, timed: bool = False) -> Callable[[torch.Generator], Media]:
    """Qwen: `count` times two frames."""

    def make(generator: torch.Generator) -> Media:
        values, grid_thw = pixels(generator, 16 * count, IN_PATCH), torch.tensor([[count, 4, 4]])
        stamps = {"second_per_grid_ts": torch.tensor([0.5])} if timed else {}
        return {"pixel_values_videos": values, "video_grid_thw": grid_thw, **stamps}

    return make


# Videos


def frames(generator: torch.Generator) -> Media:
    return {"pixel_values_videos": pixels(generator, 1, 3, 3, SIDE, SIDE)}


def eight_frames(generator: torch.Generator) -> Media:
    """For video_llava, which takes no other number of them."""
    return {"pixel_values_videos": pixels(generator, 1, 8, 3, SIDE, SIDE)}


def grid_video(generator: torch.Generator) -> Media:
    """Three times two frames."""
    return {"pixel_values_videos": pixels(generator, 48, IN_PATCH), "video_grid_thw": torch.tensor([[3, 4, 4]])}


def timed_grid_video(generator: torch.Generator) -> Media:
    return {**grid_video(generator), "second_per_grid_ts": torch.tensor([0.5])}


# What stands in the prompt


def bare(count: int, media: Media) -> list[int]:
    return [IMAGE] * count


def between_markers(count: int, media: Media) -> list[int]:
    return [OPEN, *[IMAGE] * count, CLOSE]


def idefics(count: int, media: Media) -> list[int]:
    return [FAKE, OPEN, *[IMAGE] * count, FAKE]


def in_rows(count: int, media: Media) -> list[int]:
    """Pixtral: a marker after every row but the last."""
    rows = int(media["image_sizes"][0, 0]) // (2 * PATCH)
    return [*[*[IMAGE] * (count // rows), ROW] * (rows - 1), *[IMAGE] * (count // rows), CLOSE]


def bare_video(count: int, media: Media) -> list[int]:
    return [VIDEO] * count


def video_between_markers(count: int, media: Media) -> list[int]:
    return [OPEN, *[VIDEO] * count, CLOSE]


def stamped_video(count: int, media: Media) -> list[int]:
    """Qwen 3: a time stamp before every frame."""
    times = int(media["video_grid_thw"][0, 0])
    return [token for time in range(times) for token in (10 + time, 11, OPEN, *[VIDEO] * (count // times), CLOSE)]


def glm_video(count: int, media: Media) -> list[int]:
    """GLM: frames look like pictures, with a time stamp after each."""
    times = int(media["video_grid_thw"][0, 0])
    return [ROW, *(token for time in range(times) for token in (OPEN, *[IMAGE] * (count // times), CLOSE, 10 + time)), COLUMN]


def padded_with_black(samples: list[list[Media]]) -> Media:
    """Idefics: `[B, tiles, 3, H, W]`, samples with fewer of them padded with black ones."""
    some = next((media for sample in samples for media in sample), {})
    batch: Media = {}
    for name, like in some.items():
        of_samples = [torch.cat([media[name] for media in sample]) if sample else like[:0] for sample in samples]
        most = max(len(tiles) for tiles in of_samples)
        blank = torch.zeros_like(like[:1])
        batch[name] = torch.stack([torch.cat([tiles, *[blank] * (most - len(tiles))]) for tiles in of_samples])
    return batch


def padded_to_largest(samples: list[list[Media]]) -> Media:
    """Pixtral: pictures padded on the right and below to the size of the largest."""
    flat = [media for sample in samples for media in sample]
    if not flat:
        return {}
    sizes = torch.cat([media["image_sizes"] for media in flat])
    height, width = sizes.amax(0).tolist()
    whole = [
        torch.nn.functional.pad(media["pixel_values"], (0, width - size[1], 0, height - size[0]))
        for media, size in zip(flat, sizes.tolist(), strict=True)
    ]
    return {"pixel_values": torch.cat(whole), "image_sizes": sizes}


# Which tokens are vision, as processors tell it


def mm_token_types(kinds: Tensor) -> Media:
    return {"mm_token_type_ids": kinds}


def gemma_token_types(kinds: Tensor) -> Media:
    return {"token_type_ids": kinds}


def prefix_token_types(kinds: Tensor) -> Media:
    """Paligemma: the whole prompt is prefix."""
    return {"token_type_ids": torch.zeros_like(kinds)}


OTHER_SIZES: dict[Callable[[torch.Generator], Media], tuple[Callable[[torch.Generator], Media], ...]] = {
    tile: (of_tiles(2), of_tiles(3), of_tiles(5)),
    large_square: (of_tiles(2, 4 * SIDE), of_tiles(3, 4 * SIDE), of_tiles(5, 4 * SIDE)),
    masked: (of_masked(2), of_masked(3), of_masked(5)),
    masked_for_aria: (of_masked_for_aria(2), of_masked_for_aria(3), of_masked_for_aria(5)),
    tiled: (tiled_tall, tiled_square, tiled_wide),
    sized: (of_size(SIDE, SIDE), of_size(24, 32), of_size(32, 8)),
    packed: (of_shape(2, 4), of_shape(8, 2), of_shape(4, 2)),
    grid: (of_grid(4, 4), of_grid(8, 12), of_grid(12, 4)),
    grid_of_patches: (of_patches(4, 4), of_patches(8, 8), of_patches(12, 4)),
    grid_to_merge: (to_merge(4, 8), to_merge(8, 8), to_merge(4, 12)),
    frames: (of_frames(1), of_frames(5)),
    grid_video: (of_times(1), of_times(5)),
    timed_grid_video: (of_times(1, timed=True), of_times(5, timed=True)),
}
"""What makes pictures or videos of other sizes, where a family takes them; all others have one size for every picture."""
