"""Tiny LLaVAs with seeded random weights, and prompts for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PAD = 0
FIRST_TEXT, LAST_TEXT = 3, 88
IMAGE = 90
VOCABULARY = 96
PATCH = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a model.

    Attributes:
        layers: L.
        heads: H.
        kv_heads: Hkv: `heads` (multi-head), 1 (multi-query) or between (grouped).
        head_dim: D.
        side: Patches along a side of the picture; an image is `side ** 2` tokens.
        attention: transformers' `attn_implementation`.
        seed: Of the weights.
    """

    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    side: int = 4
    attention: str = "sdpa"
    seed: int = 0

    @property
    def patches(self) -> int:
        return self.side**2


def make_model(shape: Shape = Shape()) -> Any:
    """A LLaVA in float32 on the CPU, in eval mode, that generates until it is stopped.

    Queries and keys are scaled differently in each layer, so that attention is skewed and layers differ in how much they
    look at vision: with the usual initialisation every budget would come out alike.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    hidden = shape.heads * shape.head_dim
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=shape.side * PATCH,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=shape.patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = shape.attention
    with torch.random.fork_rng():  # what is not overwritten below is the same in every call, too
        torch.manual_seed(shape.seed)
        model = LlavaForConditionalGeneration(config).eval()
    sharpness = 0.8 + 1.6 * torch.rand(shape.layers, generator=generator)  # standard deviation of attention's logits
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # The bias puts something in common into all vision embeddings, so that layers look at vision as such.
            if parameter.dim() > 1 or name.endswith("multi_modal_projector.linear_2.bias"):
                parameter.copy_(_std(name, sharpness, hidden) * torch.randn(parameter.shape, generator=generator))
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _std(name: str, sharpness: Tensor, hidden: int) -> float:
    if name.endswith(("q_proj.weight", "k_proj.weight")) and "language_model" in name:
        layer = int(name.split("layers.")[1].split(".")[0])
        return float((sharpness[layer] / hidden).sqrt())
    if name.endswith("linear_2.bias"):
        return 1.0
    if "embed_tokens" in name or "lm_head" in name:
        return 0.5
    return 0.3


def make_inputs(prompts: Sequence[Sequence[int]], *, side: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A batch, padded on the left.

    Args:
        prompts: Per sample, how many text tokens stand before, between and after its images: `[5, 7]` is five tokens, an
            image, seven tokens; `[5, 2, 7]` has two images, `[9]` none.
        side: As in `Shape`.
        seed: Of tokens and pictures. A sample's tokens and pictures depend on its place in the batch and on this.

    Returns:
        `input_ids`, `attention_mask`, and `pixel_values` where there are images.
    """
    rows, pictures = [], []
    for index, texts in enumerate(prompts):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        row: list[int] = []
        for part, count in enumerate(texts):
            if part > 0:
                row += [IMAGE] * side**2
                pictures.append(torch.randn(3, side * PATCH, side * PATCH, generator=generator))
            row += torch.randint(FIRST_TEXT, LAST_TEXT, (count,), generator=generator).tolist()
        rows.append(row)
    length = max(len(row) for row in rows)
    padding = [length - len(row) for row in rows]
    inputs = {
        "input_ids": torch.tensor([[PAD] * pad + row for pad, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding]),
    }
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures)
    return inputs


def images_of(inputs: dict[str, Tensor], *, side: int = 4) -> list[int]:
    """How many images each sample has."""
    return (inputs["input_ids"] == IMAGE).sum(1).div(side**2, rounding_mode="floor").tolist()


def reorder(inputs: dict[str, Tensor], order: Sequence[int], *, side: int = 4) -> dict[str, Tensor]:
    """The batch of the samples `order`."""
    chosen = {name: inputs[name][list(order)] for name in ("input_ids", "attention_mask")}
    if "pixel_values" in inputs:
        parts = inputs["pixel_values"].split(images_of(inputs, side=side))
        pictures = torch.cat([parts[index] for index in order])
        if len(pictures):
            chosen["pixel_values"] = pictures
    return chosen


def unpadded(inputs: dict[str, Tensor], sample: int, *, side: int = 4) -> dict[str, Tensor]:
    """One sample of the batch without its padding."""
    alone = reorder(inputs, [sample], side=side)
    padding = int((alone["attention_mask"] == 0).sum())
    for name in ("input_ids", "attention_mask"):
        alone[name] = alone[name][:, padding:]
    return alone
