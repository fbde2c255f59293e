"""What stage 3 tells the model beside the answers: which cell a token wants, and to look there.

Between question and answer the model has to work out which cell comes next (`read row r4 from c3`, two digits given: row
4, column 5), then to find it. Asked for nothing but answers it is long in finding that out. So, half-way up, a token has
to point where the features of the wanted cell point (its row and column, or its colour and its rank among that colour),
which is what attention can match; and some heads of the next layer have to look at that cell.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from tgvkv_compile.digits.pictures import COLOUR_NAMES, GRID
from tools.digits.architecture import WIDTH
from tools.digits.packing import NO_TARGET, Mark
from tools.digits.processor_files import WORD_IDS

WANTING_LAYERS = 3
"""After so many layers a token has to know which cell it wants."""
LOOKING_HEADS = 2
"""So many query heads of the next layer, those of one key head, are told where to look."""


def mark_directions(model: LlavaForConditionalGeneration) -> dict[Mark, Tensor]:
    """The directions that stage 1 gave to rows, columns and colours, of unit length, `[16 or 6, 128]` each.

    They are the embeddings of their words, as long as stage 3 has not changed them.
    """
    words: dict[Mark, list[str]] = {
        "row": [f"r{row}" for row in range(GRID)],
        "column": [f"c{column}" for column in range(GRID)],
        "colour": list(COLOUR_NAMES),
    }
    embedding = model.model.language_model.embed_tokens.weight.detach().clone()
    return {mark: functional.normalize(embedding[[WORD_IDS[name] for name in names]], dim=1) for mark, names in words.items()}


def guess_marks(hidden: Tensor, directions: dict[Mark, Tensor], rank_head: nn.Module) -> dict[Mark, Tensor]:
    """Logits of the marks of the wanted cell.

    Args:
        hidden: `[B, Q, 128]`, after `WANTING_LAYERS` layers.
        directions: From `mark_directions`.
        rank_head: Of stage 2.

    Returns:
        float32 `[B, Q, choices]` each.
    """
    pointing = functional.rms_norm(hidden.float(), (WIDTH,))
    guesses: dict[Mark, Tensor] = {mark: pointing @ direction.T for mark, direction in directions.items()}
    guesses["rank"] = rank_head(hidden.float())
    return guesses


def head_logits(reader: LlamaModel, hidden: Tensor, positions: Tensor) -> Tensor:
    """What the first heads of the layer after `WANTING_LAYERS` look at, before any mask.

    Args:
        reader: The language model.
        hidden: `[B, N, 128]`, the input of that layer.
        positions: `[B, N]` int64.

    Returns:
        Logits `[B, LOOKING_HEADS, N, N]`.
    """
    layer = cast(LlamaDecoderLayer, reader.layers[WANTING_LAYERS])
    attention = layer.self_attn
    hidden = layer.input_layernorm(hidden)
    query, key = (
        projection(hidden).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *reader.rotary_emb(hidden, positions))
    logits: Tensor = query[:, :LOOKING_HEADS] @ key[:, :1].transpose(2, 3) * attention.scaling
    return logits


def told_loss(guesses: Tensor, told: Tensor) -> Tensor:
    """Cross entropy of `guesses` `[B, Q, choices]` where `told` `[B, Q]` is not `NO_TARGET`; 0 where nothing is told."""
    if not bool((told != NO_TARGET).any()):
        return guesses.new_zeros(())
    return functional.cross_entropy(guesses.flatten(0, 1), told.flatten(), ignore_index=NO_TARGET)


def told_accuracy(guesses: Tensor, told: Tensor) -> float:
    """Share of right `guesses` `[B, Q, choices]` where `told` `[B, Q]` is not `NO_TARGET`."""
    return (guesses.argmax(-1) == told)[told != NO_TARGET].float().mean().item()
