"""The families: a tiny config each, and what its processor makes of pictures and videos."""

from typing import Any

import transformers

from tests.families import media
from tests.families.family import BOS, CLOSE, COLUMN, HIDDEN, IMAGE, OPEN, PAD, ROW, VIDEO, VOCABULARY, Family

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": media.SIDE,
    "patch_size": media.PATCH,
    "projection_dim": 16,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": media.PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": HIDDEN}
QWEN3_VISION = {**SMALL_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
WINDOW_VISION = {**SMALL_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
ROWS_OF_TILES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "vision_feature_layer": -1}
SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
UNTIED = {"tie_word_embeddings": False}  # tied embeddings of random weights repeat one token for ever
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}


def config(name: str, text: str, vision: str, text_options: Any = None, vision_options: Any = None, **options: Any) -> Any:
    """`<name>Config` with a text and a vision config of these model types.

    Args:
        name: Of the family.
        text: Model type.
        vision: Model type.
        text_options: Besides `TEXT`.
        vision_options: In place of `VISION`.
        **options: Of the whole.
    """
    return getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": text, **(text_options or {})},
        vision_config={"model_type": vision, **(vision_options or VISION)},
        **options,
    )


def _qwen(name: str, model_type: str, text: Any = None, **vision: Any) -> Any:
    return config(
        name,
        f"{model_type}_text",
        f"{model_type}_vision",
        {"rope_parameters": MROPE, **(text or {})},
        {**QWEN_VISION, **vision},
        **IDS,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )


def _glm(name: str, text: str, vision: str, text_options: Any = None) -> Any:
    return config(
        name,
        text,
        vision,
        {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **(text_options or {})},
        {**QWEN_VISION, **SMALL_VISION, "image_size": media.SIDE},
        **IDS,
        image_start_token_id=OPEN,
        image_end_token_id=CLOSE,
        video_start_token_id=ROW,
        video_end_token_id=COLUMN,
    )


def _janus() -> Any:
    vision = {**VISION, "projection_dim": HIDDEN, "num_image_tokens": 16}
    vq_vae = {
        "latent_channels": 32,
        "num_embeddings": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
        "projection_dim": HIDDEN,
        "image_token_embed_dim": HIDDEN,
    }
    return config("Janus", "llama", "janus_vision_model", None, vision, vq_config=vq_vae, image_token_id=IMAGE, **UNTIED)


def _chameleon() -> Any:
    vq_vae = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "latent_channels": 8,
        "resolution": media.SIDE,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    codes = {f"IMGIMG{chr(65 + code)}Z": 40 + code for code in range(8)}
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return transformers.ChameleonConfig(**text, vq_config=vq_vae, vocabulary_map={"<image>": IMAGE, **codes})


def _llama4() -> Any:
    text = {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 64,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
    }
    vision = {**VISION, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    markers = {"boi_token_index": OPEN, "eoi_token_index": CLOSE}
    return config("Llama4", "llama4_text", "llama4_vision_model", text, vision, image_token_index=IMAGE, **markers)


def _got_ocr2() -> Any:
    vision = {**VISION, "image_size": 4 * media.SIDE, "output_channels": 16, "window_size": 4, "mlp_dim": 32}
    vision["global_attn_indexes"] = [0]
    return config("GotOcr2", "qwen2", "got_ocr2_vision", None, vision, image_token_index=IMAGE, **UNTIED)


def _idefics2() -> Any:
    perceiver = {
        "model_type": "idefics2_perceiver",
        "hidden_size": HIDDEN,
        "resampler_n_latents": 8,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 1,
    }
    text = {"sliding_window": None}
    return config("Idefics2", "mistral", "idefics2_vision", text, None, image_token_id=IMAGE, perceiver_config=perceiver)


def _gemma3() -> Any:
    text = {**SLIDING, "query_pre_attn_scalar": 8}
    markers = {"boi_token_index": OPEN, "eoi_token_index": CLOSE, "mm_tokens_per_image": 4}
    return config("Gemma3", "gemma3_text", "siglip_vision_model", text, None, image_token_index=IMAGE, **markers, **UNTIED)


def _hybrid_qwen() -> Any:
    text = {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    return _qwen("Qwen3_5", "qwen3_5", text, **SMALL_VISION, num_position_embeddings=16)


def _ovis2() -> Any:
    indicators = {"visual_indicator_token_ids": [85, 86, 87, 88, 89], "vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    vision = {**VISION, "vocab_size": 16}
    return config("Ovis2", "qwen2", "ovis2_vision", None, vision, image_token_id=IMAGE, **indicators, **UNTIED)


QWEN2_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
INTERN_VISION = {**VISION, "image_size": [media.SIDE] * 2, "patch_size": [media.PATCH] * 2}


def _family(model: str, make: Any, picture: Any, stands: Any = media.bare, **options: Any) -> Family:
    """A family of which only pictures are tried."""
    return Family(f"{model}ForConditionalGeneration", make, {"image": picture}, {"image": stands}, **options)


def _with_video(model: str, make: Any, picture: Any, video: Any, layouts: Any, **options: Any) -> Family:
    kinds = {"image": picture, "video": video}
    return Family(f"{model}ForConditionalGeneration", make, kinds, dict(zip(kinds, layouts, strict=True)), **options)


def _qwen_family(model: str, make: Any, layout: Any = media.stamped_video, video: Any = media.grid_video) -> Family:
    layouts = (media.between_markers, layout)
    return _with_video(model, make, media.grid, video, layouts, token_types=media.mm_token_types)


BARE = (media.bare, media.bare_video)
MARKED = (media.between_markers, media.video_between_markers)

FAMILIES: dict[str, Family] = {
    "llava": _family(
        "Llava",
        lambda: config("Llava", "llama", "clip_vision_model", image_token_index=IMAGE, vision_feature_layer=-1),
        media.square,
    ),
    "llava_next": _family(
        "LlavaNext",
        lambda: config("LlavaNext", "llama", "clip_vision_model", image_token_index=IMAGE, **ROWS_OF_TILES),
        media.tiled,
        seed=1,
    ),
    "llava_next_video": _with_video(
        "LlavaNextVideo",
        lambda: config("LlavaNextVideo", "llama", "clip_vision_model", **INDICES, **ROWS_OF_TILES),
        media.tiled,
        media.frames,
        BARE,
        seed=1,
    ),
    "llava_onevision": _with_video(
        "LlavaOnevision",
        lambda: config("LlavaOnevision", "qwen2", "siglip_vision_model", **INDICES, **ROWS_OF_TILES),
        media.tiled,
        media.frames,
        BARE,
        seed=1,
    ),
    "qwen2_vl": _qwen_family(
        "Qwen2VL",
        lambda: _qwen("Qwen2VL", "qwen2_vl", embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2),
        media.video_between_markers,
    ),
    "qwen2_5_vl": _qwen_family(
        "Qwen2_5_VL",
        lambda: _qwen("Qwen2_5_VL", "qwen2_5_vl", **WINDOW_VISION),
        media.video_between_markers,
        media.timed_grid_video,
    ),
    "qwen3_vl": _qwen_family("Qwen3VL", lambda: _qwen("Qwen3VL", "qwen3_vl", **QWEN3_VISION)),
    "qwen3_vl_moe": _qwen_family("Qwen3VLMoe", lambda: _qwen("Qwen3VLMoe", "qwen3_vl_moe", QWEN2_MOE, **QWEN3_VISION)),
    "internvl": _family(
        "InternVL",
        lambda: config("InternVL", "qwen2", "internvl_vision", None, INTERN_VISION, image_token_id=IMAGE, **UNTIED),
        media.tile,
        media.between_markers,
    ),
    "smolvlm": _family(
        "SmolVLM",
        lambda: config("SmolVLM", "llama", "smolvlm_vision", image_token_id=IMAGE, scale_factor=2),
        media.masked,
        media.idefics,
        join=media.padded_with_black,
    ),
    "idefics3": _family(
        "Idefics3",
        lambda: config("Idefics3", "llama", "idefics3_vision", image_token_id=IMAGE, scale_factor=2),
        media.masked,
        media.idefics,
        join=media.padded_with_black,
    ),
    "gemma3": _family("Gemma3", _gemma3, media.square, media.between_markers, token_types=media.gemma_token_types),
    "paligemma": _family(
        "PaliGemma",
        lambda: config(
            "PaliGemma",
            "gemma",
            "siglip_vision_model",
            image_token_index=IMAGE,
            projection_dim=HIDDEN,
            hidden_size=HIDDEN,
            **UNTIED,
        ),
        media.square,
        token_types=media.prefix_token_types,
    ),
    "mistral3": _family(
        "Mistral3",
        lambda: config(
            "Mistral3",
            "mistral",
            "pixtral",
            {"sliding_window": None},
            {**VISION, "image_size": 32},
            image_token_index=IMAGE,
            spatial_merge_size=2,
            **UNTIED,
        ),
        media.sized,
        media.in_rows,
        join=media.padded_to_largest,
    ),
    "glm4v": _qwen_family("Glm4v", lambda: _glm("Glm4v", "glm4v_text", "glm4v_vision"), media.glm_video),
    "aria": _family(
        "Aria",
        lambda: config(
            "Aria",
            "aria_text",
            "idefics3_vision",
            {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            image_token_index=IMAGE,
            projector_patch_to_query_dict={16: 8},
        ),
        media.masked_for_aria,
        media.between_markers,
    ),
    "aya_vision": _family(
        "AyaVision",
        lambda: config("AyaVision", "cohere2", "siglip_vision_model", SLIDING, image_token_index=IMAGE, **UNTIED),
        media.tile,
        media.between_markers,
    ),
    "chameleon": _family("Chameleon", _chameleon, media.square, media.between_markers),
    "cohere2_vision": _family(
        "Cohere2Vision",
        lambda: config(
            "Cohere2Vision",
            "cohere2",
            "siglip_vision_model",
            SLIDING,
            image_token_id=IMAGE,
            alignment_intermediate_size=32,
            **UNTIED,
        ),
        media.tile,
        media.between_markers,
    ),
    "deepseek_vl": _family(
        "DeepseekVL",
        lambda: config("DeepseekVL", "llama", "siglip_vision_model", image_token_id=IMAGE, **UNTIED),
        media.square,
    ),
    "exaone4_5": _with_video(
        "Exaone4_5_",
        lambda: config(
            "Exaone4_5_",
            "exaone4",
            "exaone4_5_vision",
            SLIDING,
            {**QWEN_VISION, **WINDOW_VISION, "num_key_value_heads": 1},
            **IDS,
        ),
        media.grid,
        media.grid_video,
        MARKED,
    ),
    "glm46v": _qwen_family("Glm46V", lambda: _glm("Glm46V", "glm4v_text", "glm4v_vision"), media.glm_video),
    "glm4v_moe": _qwen_family(
        "Glm4vMoe", lambda: _glm("Glm4vMoe", "glm4v_moe_text", "glm4v_moe_vision", GLM_MOE), media.glm_video
    ),
    "glm_ocr": _qwen_family("GlmOcr", lambda: _glm("GlmOcr", "glm_ocr_text", "glm_ocr_vision"), media.glm_video),
    "got_ocr2": _family("GotOcr2", _got_ocr2, media.large_square, media.between_markers),
    "idefics2": _family("Idefics2", _idefics2, media.masked, media.idefics, join=media.padded_with_black),
    "janus": _family("Janus", _janus, media.square, media.between_markers),
    "lfm2_vl": _family(
        "Lfm2Vl",
        lambda: config(
            "Lfm2Vl",
            "lfm2",
            "siglip2_vision_model",
            {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
            {**VISION, "num_patches": 16},
            image_token_id=IMAGE,
            projector_hidden_size=32,
            **UNTIED,
        ),
        media.packed,
        media.between_markers,
    ),
    "lighton_ocr": _family(
        "LightOnOcr",
        lambda: config(
            "LightOnOcr",
            "qwen3",
            "pixtral",
            None,
            {**VISION, "image_size": 32},
            image_token_id=IMAGE,
            spatial_merge_size=2,
            **UNTIED,
        ),
        media.sized,
        media.in_rows,
        join=media.padded_to_largest,
    ),
    "llama4": _family("Llama4", _llama4, media.tile, media.between_markers),
    "ovis2": _family("Ovis2", _ovis2, media.tile, lambda count, _: [85, *[IMAGE] * count, 86]),
    "paddleocr_vl": _family(
        "PaddleOCRVL",
        lambda: config(
            "PaddleOCRVL",
            "paddleocr_vl_text",
            "paddleocr_vl_vision",
            {"rope_parameters": MROPE, **UNTIED},
            {**VISION, "spatial_merge_size": 2},
            **IDS,
            vision_start_token_id=OPEN,
            vision_end_token_id=CLOSE,
            **UNTIED,
        ),
        media.grid_of_patches,
        media.between_markers,
        token_types=media.mm_token_types,
    ),
    "qianfan_ocr": _family(
        "QianfanOCR",
        lambda: config("QianfanOCR", "qwen3", "qianfan_ocr_vision", None, INTERN_VISION, image_token_id=IMAGE),
        media.tile,
        media.between_markers,
    ),
    "qwen3_5": _qwen_family("Qwen3_5", _hybrid_qwen),
    "video_llama_3": _family(
        "VideoLlama3",
        lambda: config("VideoLlama3", "qwen2", "video_llama_3_vision", **IDS),
        media.grid_to_merge,
        media.between_markers,
    ),
    "video_llava": _with_video(
        "VideoLlava",
        lambda: config("VideoLlava", "llama", "clip_vision_model", **INDICES, vision_feature_layer=-1),
        media.square_as_image,
        media.eight_frames,
        BARE,
    ),
    "vipllava": _family(
        "VipLlava",
        # The second name is that of transformers 5.17.
        lambda: config(
            "VipLlava",
            "llama",
            "clip_vision_model",
            **{"image_token_index": IMAGE, "vision_feature_layer": [-1], "vision_feature_layers": [-1]},
        ),
        media.square,
    ),
}
