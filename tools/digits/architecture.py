"""The shape of the small model: stock LLaVA classes at width 128."""

from __future__ import annotations

from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tgvkv_compile.digits.pictures import CELL, GRID, PICTURE
from tools.digits.processor_files import BOS, EOS, IMAGE, PAD, WORD_IDS, WORDS

WIDTH = 128


def build_config() -> LlavaConfig:
    """The configuration: CLIP vision tower of 2 layers, Llama of 6 layers, 4 query heads on 2 key/value heads."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PICTURE,
        patch_size=CELL,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        # As Llama 3: slow rotations leave a head enough dimensions to match a row or colour wherever it stands.
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        # The default, 0.02, is far too small at this width: attention stays flat and retrieval never emerges.
        initializer_range=0.09,
        tie_word_embeddings=False,
        pad_token_id=WORD_IDS[PAD],
        bos_token_id=WORD_IDS[BOS],
        eos_token_id=WORD_IDS[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_IDS[IMAGE],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model() -> LlavaForConditionalGeneration:
    """The model with fresh weights, drawn from torch's global generator; greedy generation that stops at `<eos>`."""
    config = build_config()
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=WORD_IDS[PAD],
        bos_token_id=WORD_IDS[BOS],
        eos_token_id=WORD_IDS[EOS],
    )
    return model
