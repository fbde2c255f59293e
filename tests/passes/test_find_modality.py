from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.decoder import IMAGE, Decoder, capture, features, full_cache, tokens
from tgvkv_compile.passes.find.find_modality import find_modality


def test_the_mask_of_the_merge() -> None:
    gm, _ = capture(Decoder(), tokens(), features())
    found = find_modality(gm)
    assert found is not None
    (mask,), (merge,) = found.masks, found.merges
    assert merge.target == "masked_scatter" and merge.args[1] is mask
    assert mask.meta["example_value"].shape == (1, 19, 1) and mask.meta["example_value"].dtype == torch.bool


def test_no_merge() -> None:
    gm, _ = capture(Decoder(), tokens()[:, :1], None, full_cache(5))
    assert find_modality(gm) is None


class _Merges(nn.Module):
    """Pictures, then a film; the mask of the film is an input. Then a scatter that is no merge."""

    def forward(self, embeds: Tensor, ids: Tensor, pictures: Tensor, film_mask: Tensor, film: Tensor) -> Any:
        embeds = embeds.masked_scatter((ids == IMAGE).unsqueeze(-1).expand_as(embeds), pictures)
        embeds = torch.masked_scatter(embeds, film_mask, film)
        return embeds, embeds[0].masked_scatter(embeds[0] > 0, embeds[0])


def test_several_merges_and_masks_that_are_inputs() -> None:
    embeds, ids = torch.zeros(1, 5, 3), torch.tensor([[1, IMAGE, 2, 3, 4]])
    film_mask = torch.zeros(1, 5, 1, dtype=torch.bool)
    gm, _ = capture(_Merges(), embeds, ids, torch.ones(3), film_mask, torch.ones(3))
    assert sum(node.target in ("masked_scatter", torch.masked_scatter) for node in gm.graph.nodes) == 3
    found = find_modality(gm)
    assert found is not None and len(found.masks) == len(found.merges) == 2
    assert found.masks[0].target == "expand_as"
    assert found.masks[1].op == "placeholder"


class _Wheres(nn.Module):
    """A merge by `where`, as smolvlm of transformers 5.17 has it; then choices that are none."""

    def forward(self, embeds: Tensor, ids: Tensor, spread: Tensor) -> Any:
        mask = ids == IMAGE
        merged = torch.where(mask.unsqueeze(-1), spread, embeds)
        clipped = torch.where((merged[..., 0] > 0).unsqueeze(-1), merged, spread)
        masked_ids = torch.where(mask, torch.zeros_like(ids), ids)
        return merged, clipped, masked_ids


def test_a_merge_by_where() -> None:
    embeds, ids = torch.zeros(1, 5, 3), torch.tensor([[1, IMAGE, 2, 3, 4]])
    gm, _ = capture(_Wheres(), embeds, ids, torch.ones(1, 5, 3))
    found = find_modality(gm)
    assert found is not None
    (mask,), (merge,) = found.masks, found.merges
    assert merge.target is torch.where and mask.target == "unsqueeze"
