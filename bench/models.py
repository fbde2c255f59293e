"""Random models and prompts of a preset: the prompt reaches the decoder as that of a real model does."""

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bench.errors import BenchError
from bench.presets import Preset

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 5, 6, 7, 8
FIRST_TEXT = 16
PATCH = 14
DEEPSTACK = 3


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, pictures that are already encoded, a question.

    Attributes:
        model: That it is made for.
        ids: `[B, N]` int64.
        features: Per picture, `[tokens, hidden]`.
        deep: Whether the decoder is given features of the tower's inner layers too.
        batch: B.
        length: N.
        vision: Vision tokens of a sample.
    """

    model: Any
    ids: Tensor
    features: list[Tensor]
    deep: bool
    batch: int
    length: int
    vision: int

    def call_inputs(self) -> dict[str, Any]:
        """Keywords of a prefill, positions and cache apart.

        Pictures are handed over encoded, as `generate` does it: the time of a prefill is the decoder's. Releases of
        transformers that cannot take them so encode within the call; there `make_model` has put something in the place
        of the encoder that hands features through.
        """
        same = {"input_ids": self.ids, "use_cache": True, "logits_to_keep": 1}
        if _takes_encoded(self.model):
            return {**same, "mm_encoder_outputs": {"image": _encoded(self.features, self.deep)}}
        return {**same, "pixel_values": torch.cat(self.features)}


def pictures_of(preset: Preset) -> int:
    """How many pictures fit into a prompt beside the least text.

    Raises:
        BenchError: Not one does.
    """
    count = (preset.context - preset.least_text) // preset.picture_side**2
    if count < 1:
        needed = preset.picture_side**2 + preset.least_text
        raise BenchError(f"a context of {preset.context} tokens holds no picture; the preset needs at least {needed}")
    return count


def make_model(preset: Preset) -> Any:
    """The preset's model in eval mode, its weights made where they are used; prompts come with encoded pictures."""
    model = make_whole_model(preset)
    if not _takes_encoded(model):
        model.model.get_image_features = _hand_through(preset)
    return model


def make_whole_model(preset: Preset) -> Any:
    """The same model, which encodes pictures itself."""
    config = _CONFIGS[preset.kind](preset)
    torch.manual_seed(0)
    with torch.device(preset.device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, preset.dtype))
    return model.eval().requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """Bytes of its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def make_prompt(model: Any, preset: Preset, batch: int) -> Prompt:
    """Text, pictures, a question; the same tokens and pictures in each call, other ones in each sample."""
    generator = torch.Generator().manual_seed(1)
    pictures = pictures_of(preset)
    vision = pictures * preset.picture_side**2
    text = torch.randint(FIRST_TEXT, preset.vocabulary, (batch, preset.context - vision), generator=generator)
    before, after = text[:, : -preset.question], text[:, -preset.question :]
    ids = torch.cat([before, torch.full((batch, vision), IMAGE_TOKEN), after], dim=1).to(preset.device)
    # Features as a tower gives them. Which pictures they come from makes no difference to the decoder's time.
    shape = (batch * pictures, preset.picture_side**2, preset.hidden)
    features = torch.randn(shape, generator=generator).to(preset.device, getattr(torch, preset.dtype))
    deep = preset.kind == "qwen3_vl"
    return Prompt(model, ids, list(features), deep, batch=batch, length=preset.context, vision=vision)


def _takes_encoded(model: Any) -> bool:
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def _hand_through(preset: Preset) -> Any:
    """In the place of an encoder: takes features for pictures."""

    def get_image_features(pixel_values: Tensor, *args: Any, **options: Any) -> Any:
        return _encoded(list(pixel_values.split(preset.picture_side**2)), preset.kind == "qwen3_vl")

    return get_image_features


def _encoded(features: list[Tensor], deep: bool) -> Any:
    encoded = BaseModelOutputWithPooling(pooler_output=features)
    if deep:
        # An attribute, as models read it: the class that has it as a field is another one in each family.
        encoded.deepstack_features = [torch.cat(features)] * DEEPSTACK
    return encoded


def positions(preset: Preset, batch: int, start: int, length: int) -> Tensor:
    """Position ids of `length` tokens from `start` on, as `generate` makes them for the preset's model: int64.

    `[B, length]`, or `[3, B, length]` where positions have a time, a row and a column. Those are the same here, which
    costs as much as others would.
    """
    rows = torch.arange(start, start + length, device=preset.device).expand(batch, -1)
    return rows if preset.kind == "llava" else rows.expand(3, -1, -1)


def _llava(preset: Preset) -> Any:
    side = preset.picture_side * PATCH
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": side, "patch_size": PATCH, "projection_dim": 64},
        },
        text_config={"model_type": "llama", **_decoder(preset)},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=preset.tied,
    )


def _decoder(preset: Preset) -> dict[str, Any]:
    return {
        **{"hidden_size": preset.hidden, "intermediate_size": preset.feed_forward, "num_hidden_layers": preset.layers},
        **{"num_attention_heads": preset.heads, "num_key_value_heads": preset.kv_heads, "head_dim": preset.head_dim},
        **{"vocab_size": preset.vocabulary, "max_position_embeddings": max(8192, 2 * preset.context)},
        **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": preset.tied},
    }


def _qwen2_5_vl(preset: Preset) -> Any:
    vision = {
        **{"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": preset.hidden},
        **{"patch_size": PATCH, "fullatt_block_indexes": [0]},
    }
    return transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen_decoder(preset), **_qwen_tokens(preset))


def _qwen3_vl(preset: Preset) -> Any:
    # The decoder adds features of three of the tower's layers to the states of its own first three.
    vision = {
        **{"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": preset.hidden},
        **{"patch_size": PATCH, "deepstack_visual_indexes": list(range(DEEPSTACK))},
    }
    return transformers.Qwen3VLConfig(vision_config=vision, text_config=_qwen_decoder(preset), **_qwen_tokens(preset))


def _qwen_decoder(preset: Preset) -> dict[str, Any]:
    half = preset.head_dim // 2  # shared out to time, rows and columns, as these models do
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return {**_decoder(preset), "rope_parameters": rope}


def _qwen_tokens(preset: Preset) -> dict[str, Any]:
    media = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    markers = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return {**media, **markers, "tie_word_embeddings": preset.tied}


_CONFIGS = {"llava": _llava, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}
