"""Who is calling: what `generate` does to a cache that a graph cannot tell."""

import sys
from types import FrameType

from tgvkv_compile.errors import AssistedDecodingError

_ASSISTED = "_assisted_decoding"
"""The method of transformers that decodes with an assistant model or prompt look-up. Checked on 5.23.0."""


def refuse_assisted_decoding() -> None:
    """Raises [`AssistedDecodingError`][] where `generate` verifies several candidate tokens per call.

    To a graph they look like a prompt that ends in them, or like a next turn, whose tokens are all kept: the result would
    follow another rule than greedy decoding or sampling, which it is meant to equal.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _ASSISTED:
            raise AssistedDecodingError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) on a compressed KV cache is not supported: "
                "candidates that are verified together would not evict one by one, and rejected ones could not be taken "
                "back; call generate() without assistant_model and prompt_lookup_num_tokens"
            )
        frame = frame.f_back
