"""Further families: transformers' default config with all sizes made small, and features in the place of the vision tower's.

What is tried is the merge and the decoder, which is all that the compiler sees through `generate`.
"""

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.families.family import CLOSE, HIDDEN, IMAGE, LAST_TEXT, OPEN, PAD, VIDEO, VOCABULARY, fill

LAYERS = 4
GRIDS = ((4, 4), (4, 6), (6, 6), (2, 8))
"""Sizes of pictures in patches: towers that merge two by two make 4, 6, 9 and 4 tokens of them."""
Prompt = tuple[int, ...]
"""How many text tokens stand before, between and after the pictures of a sample."""

_MOST = {
    **dict.fromkeys(("hidden_size", "out_hidden_size", "text_hidden_size", "projection_hidden_size"), HIDDEN),
    **dict.fromkeys(("projector_hidden_size", "mlp_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "projection_dim", "image_size", "window_size", "output_channels"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("num_attention_heads", "n_routed_experts", "num_experts", "num_local_experts", "patch_size"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "depth"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "max_position_embeddings": 4096,
}
_MARKERS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_TIMM = {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BY_KIND = {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}}
_GEMMA4 = {**_BY_KIND, "per_layer_config": {}}


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """One family.

    Attributes:
        text: What the decoder's config has besides small sizes.
        vision: Model type of the vision config, where the default config has none.
        features: How features are handed over: `"list"`, one tensor per picture, or `"tensor"`.
        deep: How those of inner layers are handed over.
    """

    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    vision: str | None = None
    features: str = "list"
    deep: str = "tensor"


FAMILIES: dict[str, Shrunk] = {
    "cohere_compass": Shrunk(_BY_KIND, deep="list"),
    "cosmos3_edge": Shrunk({"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}),
    "cosmos3_omni": Shrunk(deep="list"),
    "deepseek_vl_hybrid": Shrunk(features="tensor"),
    "fast_vlm": Shrunk(features="tensor"),
    "fuyu": Shrunk(),
    "gemma4": Shrunk(_GEMMA4, vision="gemma4_vision"),
    "gemma4_unified": Shrunk(_GEMMA4, vision="gemma4_unified_vision"),
    "hyperclovax_vision_v2": Shrunk(),
    "lfm3_vl": Shrunk(),
    "minicpm_ocr": Shrunk(),
    "minicpmv4_6": Shrunk(),
    "minicpmv4_7": Shrunk(),
    "minimax_m3_vl": Shrunk(),
    "muse_glimmer": Shrunk(),
    "qwen3_5_moe": Shrunk(),
}
REFUSED: dict[str, Shrunk] = {
    "inkling2": Shrunk(),
    "kimi_k25": Shrunk({"num_key_value_heads": 4}),
    "mistral_large4": Shrunk({"num_key_value_heads": 4, "kv_source_layers": list(range(LAYERS))}),
    "step3p7": Shrunk({"sliding_window": 8}),
}


def known(name: str) -> bool:
    """Whether the installed transformers has the family."""
    return name in CONFIG_MAPPING_NAMES


def make_model(name: str, family: Shrunk, *, seed: int = 0) -> Any:
    """As `tests.families.family.make_model`; `get_image_features` gives random features."""
    make_config = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    config = make_config(**({} if family.vision is None else {"vision_config": {"model_type": family.vision}}))
    small = _shrink(config.to_dict(), text=True)
    small["text_config"] = {**small.get("text_config", {}), **family.text}
    if (small.get("vision_config") or {}).get("model_type") == "timm_wrapper":
        small["vision_config"] = {**_TIMM, "image_size": 16, "patch_size": 4, "intermediate_size": 32}
    small.pop("model_type")
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, classes if isinstance(classes, str) else classes[0])(make_config(**small)).eval()
    generator = torch.Generator().manual_seed(seed)
    sharpness = 0.8 + 1.6 * torch.rand(16, generator=generator)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            fill(parameter_name, parameter, sharpness, generator)
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    _hand_features(model, family, torch.randn(12, 9, HIDDEN, generator=generator))
    return model


def _shrink(sizes: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """A config's values with small sizes, recursively; everything else as it is."""
    small: dict[str, Any] = {}
    for name, value in sizes.items():
        if name in ("id2label", "label2id", "architectures", "dtype", "transformers_version", "_name_or_path"):
            continue
        if name == "num_hidden_layers":
            value = LAYERS if text or "layer_types" in sizes else 2
        elif name in ("layer_types", "mlp_layer_types") and value:
            value = _some_of_each(value)
        elif name == "intermediate_size" and isinstance(value, list):
            value = [_MOST[name]] * LAYERS
        elif name == "sliding_window" and value:
            value = 8
        elif name in ("fullatt_block_indexes", "deepstack_visual_indexes") and value:
            value = [0]
        elif name.endswith(("image_token_id", "image_token_index")):
            value = IMAGE
        elif name.endswith(("video_token_id", "video_token_index", "audio_token_id")):
            value = VIDEO
        elif name.endswith("_token_id") and isinstance(value, int):
            value = _MARKERS.get(name, OPEN)
        elif name in _MOST and isinstance(value, int) and value:
            value = min(value, _MOST[name])
        elif isinstance(value, dict) and "rope" not in name:
            value = _shrink(value, text="text" in name)
        small[name] = value
    return small


def _some_of_each(kinds: list[str]) -> list[str]:
    """Two kinds of layers by turns, full attention the second of them."""
    different = list(dict.fromkeys(kinds))
    if "full_attention" in different and len(different) > 1:
        different = [next(kind for kind in different if kind != "full_attention"), "full_attention"]
    return (different * LAYERS)[:LAYERS]


def _hand_features(model: Any, family: Shrunk, features: Tensor) -> None:
    """Puts features in the place of what the vision tower would make of the pictures, which say themselves how many."""

    def encode(self: Any, *args: Any, **inputs: Any) -> Any:
        pictures = inputs["pixel_values"] if "pixel_values" in inputs else args[0]
        chosen = [one[: int(picture.flatten()[0])] for one, picture in zip(features, pictures, strict=False)]
        every = torch.cat(chosen)
        encoded = BaseModelOutputWithPooling(last_hidden_state=every)
        encoded.pooler_output = torch.stack(chosen) if family.features == "tensor" else chosen
        encoded.deepstack_features = [every if family.deep == "tensor" else list(chosen)] * 2
        return encoded

    for part in {type(model): model, type(model.model): model.model}.values():
        original = getattr(type(part), "get_image_features", None)
        if original is not None:
            bound = encode.__get__(part)
            # `generate` asks the signature which inputs are the encoder's.
            part.get_image_features = _Handed(bound, inspect.signature(original.__get__(part)))


class _Handed:
    """A callable with the signature of another."""

    def __init__(self, call: Any, signature: inspect.Signature) -> None:
        self._call, self.__signature__ = call, signature

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._call(*args, **inputs)


def make_inputs(
    model: Any, prompts: tuple[Prompt, ...] = ((5, 7), (3, 2, 6), (9,)), *, first: int = 0, sizes: int = 1, seed: int = 5
) -> dict[str, Tensor]:
    """A batch padded on the left; by default one picture in the first sample, two in the second, none in the third.

    Args:
        model: The model.
        prompts: One per sample.
        first: Which of `GRIDS` the first picture has.
        sizes: How many of them there are by turns.
        seed: Of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    kinds: list[list[int]] = []
    grids: list[tuple[int, int]] = []
    for texts in prompts:
        row: list[int] = []
        for number, count in enumerate(texts):
            if number:
                grids.append(GRIDS[(first + len(grids)) % sizes])
                row += [OPEN, *[IMAGE] * tokens_of(grids[-1]), CLOSE]
            row += torch.randint(3, LAST_TEXT, (count,), generator=generator).tolist()
        rows.append(row)
        kinds.append([int(token == IMAGE) for token in row])
    length = max(len(row) for row in rows)
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    types = torch.tensor([[0] * (length - len(kind)) + kind for kind in kinds])
    further = {"mm_token_type_ids": types, "token_type_ids": types}
    if grids:
        pictures = torch.zeros(len(grids), 3, 16, 16)
        pictures[:, 0, 0, 0] = torch.tensor([float(tokens_of(grid)) for grid in grids])
        inputs["pixel_values"] = pictures
        further["image_grid_thw"] = torch.tensor([[1, *grid] for grid in grids])
        further["image_sizes"] = torch.tensor([[16, 16]] * len(grids))
        further["high_res_pixel_values"] = pictures
    wanted = inspect.signature(model.forward).parameters
    return inputs | {name: value for name, value in further.items() if name in wanted}


def tokens_of(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1] // 4
