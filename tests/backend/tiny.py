"""A LLaVA of two decoder layers with random weights, and prompts for it."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 60
PATCHES = 16
QUESTION = 6
BEFORE = 5
LENGTH = BEFORE + PATCHES + QUESTION


def tiny_llava(*, heads: int = 4, kv_heads: int = 2, layers: int = 2, attention: str = "sdpa", seed: int = 0) -> Any:
    """Seeded weights, eval mode, on the CPU in float32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch: int = 1, *, seed: int = 0) -> dict[str, Tensor]:
    """Five tokens, sixteen image placeholders, six tokens."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randint(3, 60, (batch, BEFORE), generator=generator)
    question = torch.randint(3, 60, (batch, QUESTION), generator=generator)
    ids = torch.cat([before, torch.full((batch, PATCHES), IMAGE), question], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
    }


def text_prompt(batch: int = 1, *, seed: int = 0) -> dict[str, Tensor]:
    """Eleven tokens, no image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (batch, BEFORE + QUESTION), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(inputs: dict[str, Tensor], *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """The prompt with padding tokens on either side."""
    pad = torch.nn.functional.pad
    return {
        **inputs,
        "input_ids": pad(inputs["input_ids"], (left, right), value=0),
        "attention_mask": pad(inputs["attention_mask"], (left, right), value=0),
    }


@torch.no_grad()
def prefill(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The cache after the prompt."""
    return model(**inputs, use_cache=True).past_key_values


@torch.no_grad()
def step(model: Any, cache: Any, token: int | Tensor = 7) -> Tensor:
    """Logits `[B, vocabulary]` of one more token."""
    batch = cache.layers[0].keys.shape[0]
    ids = token if isinstance(token, Tensor) else torch.full((batch, 1), token)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
