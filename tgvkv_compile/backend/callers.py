"""Who is calling: what `generate` does to a cache that a graph cannot tell."""

import sys
import warnings
from collections.abc import Iterator
from types import FrameType

from tgvkv_compile.errors import AssistedDecodingError

_ASSISTED = "_assisted_decoding"
"""The method of transformers that decodes with an assistant model or prompt look-up. Checked on 5.23.0."""


_PREFILL = "_prefill"
"""The method of transformers that reads the prompt, whole or in chunks. Checked on 5.17.0 and 5.24.0."""


def refuse_assisted_decoding() -> None:
    """Raises [`AssistedDecodingError`][] where `generate` verifies several candidate tokens per call.

    To a graph they look like a prompt that ends in them, or like a next turn, whose tokens are all kept: the result would
    follow another rule than greedy decoding or sampling, which it is meant to equal.
    """
    for frame in _callers():
        if frame.f_code.co_name == _ASSISTED:
            raise AssistedDecodingError(
                "assisted decoding (assistant_model, prompt_lookup_num_tokens) on a compressed KV cache is not supported: "
                "candidates that are verified together would not evict one by one, and rejected ones could not be taken "
                "back; call generate() without assistant_model and prompt_lookup_num_tokens"
            )


def warn_of_chunks(length: int) -> None:
    """Warns where `generate` hands the prompt over in chunks, of which this one has `length` tokens and vision among them.

    A chunk is a call as any other: what it holds is chosen when it is read, and later chunks are turns whose text is kept
    (`docs/algorithm.md`, A prompt in chunks).
    """
    for frame in _callers():
        config = frame.f_locals.get("generation_config") if frame.f_code.co_name == _PREFILL else None
        size = getattr(config, "prefill_chunk_size", None)
        tokens = frame.f_locals.get("input_ids") if size is not None else None
        if tokens is not None and tokens.shape[1] > length:
            warnings.warn(
                f"tgvkv: prefill_chunk_size={size} splits a prompt of {tokens.shape[1]} tokens: vision in a chunk is chosen by "
                "that chunk's text, before the question was read, and the text of later chunks is kept beyond the budget. "
                "Leave prefill_chunk_size unset (prefill_cap bounds what a whole prefill holds)",
                stacklevel=2,
            )
            return


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
