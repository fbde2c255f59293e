"""The tokenizer and the processor of the small model: one token per word, one image token per cell."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tgvkv_compile.digits.pictures import CELL, COLOUR_NAMES, GRID, PICTURE

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PIXEL_MEAN = 0.5
PIXEL_STD = 0.25

WORDS: tuple[str, ...] = (
    *SPECIAL,
    *(str(digit) for digit in range(10)),
    *(f"r{row}" for row in range(GRID)),
    *(f"c{column}" for column in range(GRID)),
    *COLOUR_NAMES,
    *("picture", ":", "?", "answer", "digit", "digits", "on", "at", "read", "row", "from", "to"),
)
"""The vocabulary; a word's place is its token id."""

WORD_IDS: dict[str, int] = {word: token_id for token_id, word in enumerate(WORDS)}


def build_processor() -> LlavaProcessor:
    """Builds the processor; `<bos>` is put in front of every text, and batches are padded on the left."""
    words = Tokenizer(WordLevel(WORD_IDS, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    words.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, WORD_IDS[BOS])])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessorPil(
        size={"height": PICTURE, "width": PICTURE},
        crop_size={"height": PICTURE, "width": PICTURE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops again
    )


def save_processor(folder: Path) -> None:
    """Writes the tokenizer and processor files into `folder`."""
    build_processor().save_pretrained(folder)


def word_ids(text: str) -> list[int]:
    """Token ids of plain words, without `<bos>`; the same as the tokenizer gives without special tokens."""
    return [WORD_IDS[word] for word in text.split()]
