"""Text-grounded scores of the prompt's tokens (paper sections 4.1 to 4.3; `docs/algorithm.md`, Prefill 1, 3, 4).

Every score is made of sums over the rows of the head-averaged attention `A`. The formula stands in `column_sums`,
`question_weights`, `score_vision` and `finish`; [`scores_from_attention`][] calls them once over all rows, the op
`tgvkv::prefill_scores` once per block of rows. A variant that is handed each row's log-sum-exp needs all columns of the
question rows only: for the other rows `received` is read at text columns alone.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, library

from tgvkv_compile.ops import kernels
from tgvkv_compile.ops.graph_masks import visible as seen
from tgvkv_compile.ops.roles import Roles

# Bytes that one block of attention rows may take. Larger on accelerators, where each block costs kernel launches.
_BLOCK_BYTES = {"cpu": 16 << 20}
_BLOCK_BYTES_ACCELERATOR = 128 << 20
_MIN_BLOCK_ROWS = 16


def attention_probabilities(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of each query head, in float32.

    Query heads are grouped by their key/value head by reshaping `q`; `k` is never repeated. A row that sees nothing is
    all zeros.

    Args:
        q: `[B, H, R, D]`, any floating dtype.
        k: `[B, Hkv, S, D]`, any floating dtype; `Hkv` divides `H`.
        visible: `[B | 1, 1 | H, R, S]` bool, query `r` sees key `s`; None: every query sees every key.
        scale: The factor on the logits.

    Returns:
        `[B, H, R, S]` float32.
    """
    return masked_softmax(_logits(q, k, scale), visible)


def masked_softmax(logits: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last dimension of what is visible (None: all of it), 0 elsewhere and in rows that see nothing."""
    if visible is None:
        return logits.softmax(-1)
    return _visible_softmax(logits, visible).masked_fill(~visible, 0.0)


def _visible_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible: 0 elsewhere, but for rows that see nothing, which are finite."""
    return logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)


def causal_probabilities(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """As [`attention_probabilities`][], for callers that leave out rows that see nothing: one pass over them less."""
    return _visible_softmax(_logits(q, k, scale), visible)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`q @ k^T * scale`, `[B, H, R, S]` float32, of `q [B, H, R, D]` and `k [B, Hkv, S, D]`."""
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    grouped = (q.to(torch.float32) * scale).reshape(batch, kv_heads, groups * rows, dim)
    # Not one reshape: for a dynamic `rows` that is `keys` as well, torch.export takes it for a guard that it cannot solve.
    logits = exact_matmul(grouped, k.to(torch.float32).transpose(2, 3))
    return logits.view(batch, kv_heads, groups, rows, k.shape[2]).flatten(1, 2)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 in float32, also where the caller is under autocast, which would round both."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


def _known_normaliser(q: Tensor, k: Tensor, visible: Tensor, lse: Tensor, scale: float) -> Tensor:
    """As [`attention_probabilities`][], for any subset of the keys: `lse [B, H, R]` is over all of them."""
    return (_logits(q, k, scale) - lse.unsqueeze(3)).exp_().masked_fill_(~visible, 0.0)


class Sums(NamedTuple):
    """Sums over attention rows, all `[B, S]` float32.

    Attributes:
        received: Attention that each column receives from all valid rows.
        asked: Attention that it receives from the question's rows.
        askers: How many question rows see it.
    """

    received: Tensor
    asked: Tensor
    askers: Tensor


def column_sums(attention: Tensor, visible: Tensor, valid: Tensor, question: Tensor) -> Sums:
    """Sums a block of rows: `attention [B, R, S]`, `visible [B | 1, R, S]`, `valid` and `question` `[B, R]` of rows.

    Elementwise products, not matmul: TF32 must not round the scores.
    """
    valid_row = valid.to(torch.float32).unsqueeze(2)
    question_row = question.to(torch.float32).unsqueeze(2)
    return Sums(
        received=(attention * valid_row).sum(1),
        asked=(attention * question_row).sum(1),
        askers=(visible.to(torch.float32) * question_row).sum(1),
    )


def question_weights(sums: Sums, question: Tensor) -> Tensor:
    """`u_j [B, N]`: the mean attention that question token `j` receives from the question tokens that see it."""
    return torch.where(question, sums.asked / sums.askers.clamp(min=1.0), 0.0)


def score_vision(attention: Tensor, weights: Tensor) -> Tensor:
    """`sum_j u_j * A[j, :]` over a block of rows: `attention [B, R, S]`, `weights [B, R]` of the rows -> `[B, S]`."""
    return (attention * weights.unsqueeze(2)).sum(1)


def finish(sums: Sums, vision_scores: Tensor, vision: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mass `m_l [B]` and score `[B, N]` (`s_v` at vision, `s_t` at text, 0 at padding) from the complete sums."""
    mass = torch.where(vision, sums.asked, 0.0).sum(1)
    score = torch.where(valid, torch.where(vision, vision_scores, sums.received), 0.0)
    return mass, score


def scores_from_attention(attention: Tensor, visible: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
    """Text-vision mass and token scores from materialised attention (`docs/algorithm.md`, Prefill 1, 3, 4).

    "`i >= j`" of the formulas is "`i` sees `j`" here, which is the same for causal attention and right for the others.
    The `R` rows are the queries of the last `R` columns: all of a prompt (`R` is `S` is `N`), or the new tokens of a later
    turn behind what the cache still holds.

    Args:
        attention: `[B, R, S]` float32, probabilities averaged over query heads.
        visible: `[B | 1, R, S]` bool, query row sees key column.
        roles: Of the `S` columns.

    Returns:
        mass: `[B]` float32, `m_l`.
        score: `[B, S]` float32, `s_t` at text, `s_v` at vision, 0 at padding.
    """
    attention = attention.masked_fill(~visible, 0.0)
    rows = slice(attention.shape[2] - attention.shape[1], None)
    sums = column_sums(attention, visible, roles.valid[:, rows], roles.question[:, rows])
    vision_scores = score_vision(attention, question_weights(sums, roles.question)[:, rows])
    return finish(sums, vision_scores, roles.vision, roles.valid)


def _block_rows(q: Tensor, columns: int) -> int:
    """Rows of `q [B, H, N, D]` per block, such that the block's attention on `columns` stays within its bytes."""
    batch, heads, _, _ = q.shape
    limit = _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_ACCELERATOR)
    return max(_MIN_BLOCK_ROWS, limit // max(1, 4 * batch * heads * columns))


def _block_visible(valid: Tensor, attn_mask: Tensor | None, is_causal: bool, start: int, end: int, columns: Tensor) -> Tensor:
    """Which of the keys `columns [C]` the rows `start … end - 1` see: `[B, 1 | H, R, C]` bool."""
    visible = valid[:, None, None, columns].expand(-1, 1, end - start, -1)
    if is_causal:
        row = torch.arange(start, end, device=valid.device)
        visible = visible & (row.unsqueeze(1) >= columns)
    if attn_mask is not None:
        block = attn_mask[:, :, start:end].index_select(3, columns)
        visible = visible & seen(block)
    return visible


def _first_question(question: Tensor) -> int:
    """The first row that is a question row of some sample: rows before it need no second pass.

    One host read; under CUDA graph capture there can be none, and every row counts.
    """
    if question.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0
    return int(question.any(0).to(torch.uint8).argmax())


class Prompt(NamedTuple):
    """What one call of the op scores: the arguments of [`prefill_scores`][], the roles as three masks of the columns."""

    q: Tensor
    k: Tensor
    vision: Tensor
    valid: Tensor
    question: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    lse: Tensor | None

    def of_rows(self, columns: Tensor) -> Tensor:
        """The part of `columns` `[B, S]` that stands for the rows: the last `R`."""
        return columns[:, columns.shape[1] - self.q.shape[2] :]

    def attention(self, start: int, end: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Head-mean attention and visibility of rows `start … end - 1`, both `[B, R, C]`.

        Args:
            start: First row.
            end: One past the last row.
            columns: int64 `[C]`, the keys wanted, if the normaliser is known; None: all that such rows may see.
        """
        keys = end if self.is_causal else self.k.shape[2]
        chosen = torch.arange(keys, device=self.k.device) if columns is None else columns
        k = self.k[:, :, :keys] if columns is None else self.k.index_select(2, columns)
        visible = _block_visible(self.valid, self.attn_mask, self.is_causal, start, end, chosen)
        rows = self.q[:, :, start:end]
        if self.lse is None:
            attention = attention_probabilities(rows, k, visible, self.scale)
        else:
            attention = _known_normaliser(rows, k, visible, self.lse[:, :, start:end], self.scale)
        return attention.mean(1), visible.any(1)


def _text_received(prompt: Prompt) -> Tensor:
    """`s_t` at text `[B, S]` where the normaliser is known: all rows, but only the columns of text."""
    columns = (prompt.valid & ~prompt.vision).any(0).nonzero()[:, 0]
    received = torch.zeros(prompt.valid.shape, dtype=torch.float32, device=prompt.q.device)
    length = prompt.q.shape[2]
    valid_rows = prompt.of_rows(prompt.valid)
    block = _block_rows(prompt.q, columns.shape[0])
    for start in range(0, length, block):
        end = min(start + block, length)
        attention, _ = prompt.attention(start, end, columns)
        received[:, columns] += (attention * valid_rows[:, start:end, None]).sum(1)
    return received


def sum_rows(prompt: Prompt) -> Sums:
    """The complete sums over the prompt's rows.

    Without the normaliser every row is normalised anew, which takes all rows and columns. With it, only the question's
    rows and the columns of text are looked at.
    """
    (batch, _, length, _), columns = prompt.q.shape, prompt.k.shape[2]
    block = _block_rows(prompt.q, columns)
    valid, question = prompt.of_rows(prompt.valid), prompt.of_rows(prompt.question)
    total = Sums(*torch.zeros((3, batch, columns), dtype=torch.float32, device=prompt.q.device).unbind())
    for start in range(0, length, block) if prompt.lse is None else _asking(prompt, block):
        attention, visible = prompt.attention(start, min(start + block, length))
        rows = slice(start, start + attention.shape[1])
        part = column_sums(attention, visible, valid[:, rows], question[:, rows])
        for accumulated, added in zip(total, part, strict=True):
            accumulated[:, : added.shape[1]] += added
    return total if prompt.lse is None else total._replace(received=_text_received(prompt))


def weigh_rows(prompt: Prompt, weights: Tensor) -> Tensor:
    """`s_v [B, S]` of the question's weights `u_j`, `weights [B, S]`: a second walk over its rows."""
    length = prompt.q.shape[2]
    block = _block_rows(prompt.q, weights.shape[1])
    of_rows = prompt.of_rows(weights)
    scores = torch.zeros_like(weights)
    for start in _asking(prompt, block):
        attention, _ = prompt.attention(start, min(start + block, length))
        rows = slice(start, start + attention.shape[1])
        scores[:, : attention.shape[2]] += score_vision(attention, of_rows[:, rows])
    return scores


def _asking(prompt: Prompt, block: int) -> range:
    """First rows of the blocks that hold question rows."""
    return range(_first_question(prompt.of_rows(prompt.question)), prompt.q.shape[2], block)


@library.custom_op("tgvkv::prefill_scores", mutates_args=())
def _prefill_scores(
    q: Tensor,
    k: Tensor,
    vision: Tensor,
    valid: Tensor,
    question: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[`scores_from_attention`][] of `q [B, H, R, D]` and `k [B, Hkv, S, D]`, a block of rows at a time."""
    prompt = Prompt(q, k.to(torch.float32), vision, valid, question, attn_mask, is_causal, scale, lse)
    sums = sum_rows(prompt)
    return finish(sums, weigh_rows(prompt, question_weights(sums, question)), vision, valid)


_plain_prefill_scores: Callable[..., tuple[Tensor, Tensor]] = _prefill_scores._init_fn


@_prefill_scores.register_kernel("cuda")
def _prefill_scores_on_cuda(
    q: Tensor,
    k: Tensor,
    vision: Tensor,
    valid: Tensor,
    question: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A Triton kernel where attention gave its log-sum-exp; the plain functions where not."""
    prompt = Prompt(q, k, vision, valid, question, attn_mask, is_causal, scale, lse)
    if not kernels.available():
        return _plain_prefill_scores(*prompt)
    from tgvkv_compile.ops.kernels import prefill as fused

    return fused.fused_prefill_scores(prompt) if fused.fused_applies(q, k, attn_mask, lse) else _plain_prefill_scores(*prompt)


@_prefill_scores.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    mass = q.new_empty((q.shape[0],), dtype=torch.float32)
    return mass, q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)


def prefill_scores(
    q: Tensor,
    k: Tensor,
    roles: Roles,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Text-vision mass and token scores of one layer, without ever holding `N x N` attention.

    Calls the opaque op `tgvkv::prefill_scores`. The rows are the queries of the last `R` columns: `R` is `S` in a prefill.

    Args:
        q: `[B, H, R, D]`, any floating dtype; the maths is float32.
        k: `[B, Hkv, S, D]`, any floating dtype.
        roles: Of the `S` columns; padding is neither seen nor counted, whatever the mask says.
        attn_mask: `[B | 1, 1 | H, R, S]`, bool (True is visible) or additive (visible where above half of the lowest
            finite value); None if there is none.
        is_causal: Whether rows see no later column, besides what the mask says; only where `R` is `S`.
        scale: The factor on the logits.
        lse: `[B, H, R]` float32, the log-sum-exp of each row's visible logits, where attention gives it
            (`ops.attention`): then only question rows and text columns are computed.

    Returns:
        mass: `[B]` float32, `m_l`.
        score: `[B, S]` float32, as [`scores_from_attention`][].
    """
    result = torch.ops.tgvkv.prefill_scores(q, k, roles.vision, roles.valid, roles.question, attn_mask, is_causal, scale, lse)
    return cast(tuple[Tensor, Tensor], result)
