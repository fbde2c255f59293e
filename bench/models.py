"""Random models and prompts of a preset: the prompt reaches the decoder as that of a real model does."""

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bench.errors import BenchError
from bench.presets import Preset

IMAGE_TOKEN = 5
FIRST_TEXT = 16
PATCH = 14


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, pictures that are already encoded, a question.

    Attributes:
        model: That it is made for.
        ids: `[B, N]` int64.
        features: Per picture, `[tokens, hidden]`.
        batch: B.
        length: N.
        vision: Vision tokens of a sample.
    """

    model: Any
    ids: Tensor
    features: list[Tensor]
    batch: int
    length: int
    vision: int

    def call_inputs(self) -> dict[str, Any]:
        """Keywords of a prefill, positions and cache apart.

        Pictures are handed over encoded, as `generate` does it: the time of a prefill is the decoder's.
        """
        encoded = BaseModelOutputWithPooling(pooler_output=self.features)
        return {"input_ids": self.ids, "mm_encoder_outputs": {"image": encoded}, "use_cache": True, "logits_to_keep": 1}


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
    """The preset's model in eval mode, its weights made where they are used."""
    config = _CONFIGS[preset.kind](preset)
    torch.manual_seed(0)
    with torch.device(preset.device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, preset.dtype))
    model.eval().requires_grad_(False)
    return model


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
    return Prompt(model, ids, list(features), batch=batch, length=preset.context, vision=vision)


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


_CONFIGS = {"llava": _llava}
