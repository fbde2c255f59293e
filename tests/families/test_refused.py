"""Models that text-guided eviction cannot work on are refused, never run dense without a word."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from tests.families.family import IMAGE, PAD, make_inputs, make_model
from tests.families.table import FAMILIES, TEXT
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import UnsupportedGraphError


def mllama() -> Any:
    """One layer of self-attention, one of cross-attention."""
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 32,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)).eval()


def mllama_inputs() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[1, IMAGE, 5, 6, 7, 8]]),
        "pixel_values": torch.randn(1, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, 6, 1, 2, dtype=torch.int64),
    }


def florence2() -> Any:
    """One stage of vision, and a BART of one layer on each side."""
    vision = {
        "depths": [1],
        "patch_size": [4],
        "patch_stride": [4],
        "patch_padding": [0],
        "patch_prenorm": [False],
        "embed_dim": [16],
        "num_heads": [2],
        "num_groups": [2],
        "window_size": 4,
        "projection_dim": 32,
    }
    text = {
        "model_type": "bart",
        "vocab_size": 96,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "pad_token_id": PAD,
    }
    return Florence2ForConditionalGeneration(
        Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    ).eval()


def florence2_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[*[IMAGE] * 17, 5, 6, 7]]), "pixel_values": torch.randn(1, 3, 16, 16)}


@pytest.mark.parametrize(("make", "give"), [(mllama, mllama_inputs), (florence2, florence2_inputs)])
def test_vision_apart_from_the_prompt(make: Any, give: Any) -> None:
    model, inputs = make(), give()
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    model.generate(**inputs, **options)  # the model itself works
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    with pytest.raises(UnsupportedGraphError) as caught:
        model.generate(**inputs, **options)
    text = str(caught.value)
    assert "cross-attention" in text and "mllama" in text and "on_unsupported='passthrough'" in text and ".py:" in text


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "chameleon"])
def test_a_picture_given_again_without_its_tokens(name: str) -> None:
    """In a later turn, or with the next token: transformers says so itself."""
    family, said = FAMILIES[name], []
    for compiled in (False, True):
        model = make_model(family)
        inputs = make_inputs(family, model, ((5, "image", 9),))
        if compiled:
            model.compile(backend=tgvkv_backend(0.5, lowering="eager"))
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        for tokens in (torch.tensor([[7, 8, 9]]), torch.tensor([[7]])):
            again = {**inputs, "input_ids": tokens, "attention_mask": torch.ones(1, cache.get_seq_length() + tokens.shape[1])}
            for types in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
                again[types] = torch.zeros_like(tokens)
            with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 0") as caught:
                model(**again, past_key_values=cache, use_cache=True)
            said.append(str(caught.value))
    assert said[:2] == said[2:]


def test_embeddings_of_which_nothing_is_known() -> None:
    """Vision may be hidden among them."""
    family = FAMILIES["ovis2"]
    model = make_model(family)
    inputs = make_inputs(family, model, ((5, "image", 9),))
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UnsupportedGraphError, match="handed embeddings, not tokens") as caught, torch.no_grad():
        model(inputs_embeds=embeds)
    assert "inputs_embeds" in str(caught.value) and "TORCH_LOGS=graph_breaks" in str(caught.value)
