"""Watching uncompiled code merge vision into embeddings."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tgvkv_compile.backend.merges import MergeWatch

TOKENS = torch.tensor([[3, 9, 9, 4, 5], [9, 4, 9, 3, 3]])
WEIGHT = torch.arange(80.0).reshape(10, 8)
IMAGE = TOKENS == 9
FEATURES = torch.randn(4, 8)
SPREAD = torch.randn(2, 5, 8)


def look_up() -> Tensor:
    return torch.nn.functional.embedding(TOKENS, WEIGHT)


def scatter(embeds: Tensor) -> Tensor:
    return embeds.masked_scatter(IMAGE.unsqueeze(-1), FEATURES)


def scatter_wide(embeds: Tensor) -> Tensor:
    return embeds.masked_scatter(IMAGE.unsqueeze(-1).expand(2, 5, 8), FEATURES)


def scatter_in_place(embeds: Tensor) -> Tensor:
    embeds.masked_scatter_(IMAGE.unsqueeze(-1), FEATURES)
    return embeds


def choose(embeds: Tensor) -> Tensor:
    return torch.where(IMAGE.unsqueeze(-1), SPREAD, embeds)


def choose_otherwise(embeds: Tensor) -> Tensor:
    return torch.where(~IMAGE.unsqueeze(-1), embeds, SPREAD)


def assign(embeds: Tensor) -> Tensor:
    embeds = embeds.clone()
    embeds[IMAGE] = FEATURES
    return embeds


def put(embeds: Tensor) -> Tensor:
    return embeds.index_put((IMAGE,), FEATURES)


def add_then_cast(embeds: Tensor) -> Tensor:
    return (scatter(embeds * 2.0) + 1.0).to(torch.bfloat16)


@pytest.mark.parametrize(
    "merge", [scatter, scatter_wide, scatter_in_place, choose, choose_otherwise, assign, put, add_then_cast]
)
def test_every_way_to_merge_is_seen(merge: Callable[[Tensor], Tensor]) -> None:
    watch = MergeWatch()
    with watch:
        merged = merge(look_up())
    assert watch.knows(merged)
    vision = watch.vision(merged)
    assert vision is not None and torch.equal(vision[..., 0], IMAGE)


def test_several_merges_add_up() -> None:
    first, second = TOKENS == 9, TOKENS == 4
    watch = MergeWatch()
    with watch:
        embeds = look_up().masked_scatter(first.unsqueeze(-1), FEATURES)
        embeds = embeds.masked_scatter(second.unsqueeze(-1), FEATURES)
    vision = watch.vision(embeds)
    assert vision is not None and torch.equal(vision[..., 0], first | second)


def mark(embeds: Tensor) -> Tensor:
    embeds[TOKENS == 4] = torch.randn(8)
    return embeds


def mark_out_of_place(embeds: Tensor) -> Tensor:
    return embeds.index_put((TOKENS == 4,), torch.randn(8))


@pytest.mark.parametrize("way", [mark, mark_out_of_place])
def test_one_vector_for_every_marker_is_no_picture(way: Callable[[Tensor], Tensor]) -> None:
    watch = MergeWatch()
    with watch:
        text = way(look_up() * 1.0)
        pictures = way(scatter(look_up()))
    assert watch.knows(text) and watch.vision(text) is None
    vision = watch.vision(pictures)
    assert watch.knows(pictures) and vision is not None and torch.equal(vision[..., 0], IMAGE)


def test_text_alone_is_known_to_be_text() -> None:
    watch = MergeWatch()
    with watch:
        embeds = look_up() * 3.0
    assert watch.knows(embeds) and watch.vision(embeds) is None


def test_what_was_not_looked_up_is_unknown() -> None:
    watch = MergeWatch()
    with watch:
        given = scatter(torch.randn(2, 5, 8))
        tower = torch.where(torch.ones(2, 5, 1, dtype=torch.bool), SPREAD, torch.zeros(2, 5, 8))
        longer = torch.cat([look_up(), look_up()], dim=1)
    assert not watch.knows(given) and not watch.knows(tower) and not watch.knows(longer)


def test_it_sees_nothing_when_it_is_left() -> None:
    watch = MergeWatch()
    with watch:
        embeds = look_up()
    assert not watch.knows(scatter(embeds))
