"""Prefill's scores by a Triton kernel: `tgvkv::prefill_scores` on CUDA, where attention gave its log-sum-exp."""

import dataclasses

import torch
from torch import Tensor

from tgvkv_compile.ops.kernels.decode import MOST_REGISTERS, next_power, processors
from tgvkv_compile.ops.kernels.prefill_kernels import weigh_attention
from tgvkv_compile.ops.scoring import Prompt, Sums, finish, question_weights

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DIM = 256
_MAX_PARTS = 8


@dataclasses.dataclass(frozen=True)
class WeighPlan:
    """How one sum of attention rows is launched.

    Attributes:
        dim: D, padded to a power of two.
        rows: Rows that a program looks at together.
        columns: Columns that it looks at.
        parts: Programs that share the rows of a block of columns.
        warps: Of the kernel.
    """

    dim: int
    rows: int
    columns: int
    parts: int
    warps: int


def plan_weighing(batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype, processors: int) -> WeighPlan:
    """The launch for these shapes on a device with so many multiprocessors."""
    padded = max(64, next_power(dim))
    block = (64 if dtype.itemsize == 2 else 32) // (2 if padded > 128 else 1)  # more would not fit into registers
    # Text stands in a few blocks of columns: only parts of the rows give the device enough to do.
    parts = max(1, min(_MAX_PARTS, processors // (batch * heads), -(-rows // (4 * block))))
    return WeighPlan(padded, block, block, parts, 8 if block * padded >= 64 * 64 else 4)


def fused_applies(q: Tensor, k: Tensor, attn_mask: Tensor | None, lse: Tensor | None) -> bool:
    """Whether the kernel is made for this call; a mask of each head's own goes the plain way."""
    alike = q.dtype == k.dtype and q.dtype in _DTYPES and q.shape[3] <= _MAX_DIM
    return lse is not None and alike and (attn_mask is None or attn_mask.shape[1] == 1)


def fused_prefill_scores(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The scores of one layer; nothing larger than `[B, H, parts, S]` float32 is held, and nothing read on the host.

    Args:
        prompt: With `lse`; `k` in its own dtype.

    Returns:
        `mass [B]` and `score [B, S]`, as `prefill_scores`.
    """
    question = prompt.of_rows(prompt.question)
    asking = question.any(0).to(torch.uint8).argmax()
    everyone = torch.zeros_like(asking)
    text = prompt.valid & ~prompt.vision
    received, _ = weigh(prompt, prompt.of_rows(prompt.valid), text, everyone)
    asked, askers = weigh(prompt, question, prompt.valid, asking)
    sums = Sums(received, asked, askers)
    weights = question_weights(sums, prompt.question)
    scores, _ = weigh(prompt, prompt.of_rows(weights), prompt.valid & prompt.vision, asking)
    return finish(sums, scores, prompt.vision, prompt.valid)


def weigh(prompt: Prompt, weights: Tensor, wanted: Tensor, first_row: Tensor) -> tuple[Tensor, Tensor]:
    """Sums head-mean attention over rows, each row with its weight.

    Args:
        prompt: With `lse`.
        weights: `[B, R]`, at least 0.
        wanted: bool `[B, S]`; the sums of other columns are 0. Padding must not be among them.
        first_row: int64 `[]`: rows before it weigh nothing.

    Returns:
        The sums, and for each column the sum of the weights of the rows that see it; float32 `[B, S]`.
    """
    q, k, lse, mask = prompt.q, prompt.k, prompt.lse, prompt.attn_mask
    assert lse is not None
    batch, heads, rows, dim = q.shape
    columns = k.shape[2]
    plan = plan_weighing(batch, heads, rows, dim, q.dtype, processors(q.device))
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    sums = torch.empty((batch, heads, plan.parts, columns), dtype=torch.float32, device=q.device)
    seen = torch.empty((batch, plan.parts, columns), dtype=torch.float32, device=q.device)
    kind, lowest, strides = 0, 0.0, (0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        lowest = 0.0 if kind == 1 else torch.finfo(mask.dtype).min / 2
        strides = (mask.stride(0) if mask.shape[0] != 1 else 0, mask.stride(2), mask.stride(3))
        mask = mask.view(torch.uint8) if kind == 1 else mask
    weigh_attention[(-(-columns // plan.columns), plan.parts, batch * heads)](
        q,
        k,
        lse.contiguous(),
        weights.to(torch.float32).contiguous(),
        wanted.contiguous().view(torch.uint8),
        first_row,
        sums if mask is None else mask,
        sums,
        seen,
        prompt.scale,
        lowest,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        *strides,
        heads,
        heads // k.shape[1],
        rows,
        columns,
        -(-rows // plan.parts),
        D=dim,
        DIM=plan.dim,
        ROWS=plan.rows,
        COLUMNS=plan.columns,
        CAUSAL=prompt.is_causal,
        MASK=kind,
        WIDE=q.dtype == torch.float32,
        COUNT=True,
        num_warps=plan.warps,
        num_stages=2,
        maxnreg=MOST_REGISTERS if plan.warps == 4 else None,
    )
    return sums.sum(2).mean(1), seen.sum(1)
