"""The model families that the fuzzer draws from: one entry a family, everything else is drawn alike for all of them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.families import family as tiny
from tests.families.table import FAMILIES as TINY
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
        needs_positions: Position ids are always passed: the model's own have three rows, which tell rows and columns of
            pictures apart, and the reference counts tokens.
        generates: Whether `generate` may be called: it makes such positions itself.
        crops: Whether `crop` may be called: sliding-window layers have dropped what it would need.
    """

    shapes: st.SearchStrategy[Any]
    make_model: Callable[[Any, int], Any]
    make_inputs: Callable[[Any, Sequence[Prompt], int], dict[str, Tensor]]
    image_token: int | tuple[int, ...]
    encode: Callable[[Any, dict[str, Tensor]], dict[str, Any]] | None = None
    text_tokens: tuple[int, int] = (3, 88)
    max_images: int = 4
    needs_positions: bool = False
    generates: bool = True
    crops: bool = True


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


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One of the models of `tests.families`; it has one shape."""

    name: str
    attention: str = "sdpa"


def _tiny_model(shape: Tiny, seed: int) -> Any:
    model = tiny.make_model(dataclasses.replace(TINY[shape.name], seed=seed))
    model.set_attn_implementation(shape.attention)
    return model


_counting = functools.cache(_tiny_model)  # one that is asked how many tokens a picture becomes


def _tiny_inputs(shape: Tiny, prompts: Sequence[Prompt], seed: int) -> dict[str, Tensor]:
    """As `tests.support.models.make_inputs`: texts, with a picture between each two."""
    spelt = tuple(tuple(part for text in prompt for part in ("image", text))[1:] for prompt in prompts)
    return tiny.make_inputs(TINY[shape.name], _counting(Tiny(shape.name), 0), spelt, seed=seed)


def _tiny(name: str, **differing: Any) -> Family:
    return Family(
        shapes=st.builds(Tiny, st.just(name), st.sampled_from(["sdpa", "sdpa", "eager"])),
        make_model=_tiny_model,
        make_inputs=_tiny_inputs,
        image_token=(tiny.IMAGE, tiny.VIDEO),
        text_tokens=(tiny.FIRST_TEXT, tiny.LAST_TEXT),
        max_images=3,
        **differing,
    )


_ROWS = {"needs_positions": True, "generates": False}
_ENCODED = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters  # since 5.23

FAMILIES: dict[str, Family] = {
    "llava": Family(
        shapes=_llava_shapes(),
        make_model=lambda shape, seed: make_model(dataclasses.replace(shape, seed=seed)),
        make_inputs=lambda shape, prompts, seed: make_inputs(prompts, side=shape.side, seed=seed),
        image_token=IMAGE,
        encode=_encode_llava if _ENCODED else None,
    ),
    "gemma3": _tiny("gemma3", crops=False),
    "glm4v": _tiny("glm4v", **_ROWS),
    "idefics3": _tiny("idefics3"),
    "internvl": _tiny("internvl"),
    "llava_next": _tiny("llava_next"),
    "llava_onevision": _tiny("llava_onevision"),
    "mistral3": _tiny("mistral3"),
    "paligemma": _tiny("paligemma"),
    "qwen2_5_vl": _tiny("qwen2_5_vl", **_ROWS),
    "qwen3_vl": _tiny("qwen3_vl", **_ROWS),
    "smolvlm": _tiny("smolvlm"),
}
