"""The model families that the fuzzer draws from: one entry a family, everything else is drawn alike for all of them."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.support.models import IMAGE, Shape, make_inputs, make_model

Prompt = tuple[int, ...]
"""One sample: how many text tokens stand before, between and after its images (`tests.support.models.make_inputs`)."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How to draw and build the models of a family.

    Attributes:
        shapes: Draws what `make_model` takes; its `repr` must be enough to build the model again.
        make_model: `(shape, seed)` to a fresh model; only its weights depend on the seed.
        make_inputs: `(shape, prompts, seed)` to a batch padded on the left: `input_ids`, `attention_mask` and, where
            there are images, what the model wants beside them.
        image_token: Id of vision placeholders; tokens below `text_tokens` are text.
        text_tokens: First and last id of text.
        encode: `(model, inputs)` to what the model takes in place of pictures when they are encoded beforehand, as
            `generate` does; None where it cannot.
        max_images: Most images of a batch.
        gives_positions: Position ids of a text model may be passed (`generate` does).
    """

    shapes: st.SearchStrategy[Any]
    make_model: Callable[[Any, int], Any]
    make_inputs: Callable[[Any, Sequence[Prompt], int], dict[str, Tensor]]
    image_token: int
    encode: Callable[[Any, dict[str, Tensor]], dict[str, Any]] | None = None
    text_tokens: tuple[int, int] = (3, 88)
    max_images: int = 4
    gives_positions: bool = True


@st.composite
def _llava_shapes(draw: st.DrawFn) -> Shape:
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (4, 1), (6, 3), (3, 1), (4, 4)]))
    return Shape(
        layers=draw(st.sampled_from([1, 2, 2, 3])),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 4, 16])),
        side=draw(st.integers(3, 5)),
        attention=draw(st.sampled_from(["sdpa", "sdpa", "sdpa", "eager"])),
    )


def _encode_llava(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
    # One tensor for all pictures, so that dynamo compiles for no number of them.
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])}}


_ENCODED = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters  # since 5.23

FAMILIES: dict[str, Family] = {
    "llava": Family(
        shapes=_llava_shapes(),
        make_model=lambda shape, seed: make_model(dataclasses.replace(shape, seed=seed)),
        make_inputs=lambda shape, prompts, seed: make_inputs(prompts, side=shape.side, seed=seed),
        image_token=IMAGE,
        encode=_encode_llava if _ENCODED else None,
    ),
}
