"""From pictures and words to what a model takes, by its stock processor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tgvkv_compile.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

BLANK_SIZE = 336


def request_of(processor: Any, images: Sequence["Image"], prompt: str) -> Any:
    """What the processor makes of pictures and a question: its chat template, or image tokens in front of the words.

    Raises:
        ConfigError: The prompt has more image tokens than there are pictures.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    text = with_image_tokens(prompt, _image_token(processor), len(images))
    return processor(images=list(images), text=[text], return_tensors="pt")


def with_image_tokens(prompt: str, token: str, count: int) -> str:
    """Puts the image tokens that are missing in front of a prompt.

    Raises:
        ConfigError: The prompt has more image tokens than there are pictures.
    """
    there = prompt.count(token)
    if there > count:
        raise ConfigError(f"the prompt has {there} {token} for {count} pictures; give a picture for each")
    return " ".join([token] * (count - there) + [prompt])


def _image_token(processor: Any) -> str:
    for owner in (processor, getattr(processor, "tokenizer", None)):
        token = getattr(owner, "image_token", None)
        if token:
            return str(token)
    return "<image>"


def blank_image() -> "Image":
    """A grey picture, for a model that is asked without a question in mind."""
    from PIL import Image

    return Image.new("RGB", (BLANK_SIZE, BLANK_SIZE), (128, 128, 128))
