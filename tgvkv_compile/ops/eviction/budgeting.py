"""How many entries each layer keeps (paper section 4.1; `docs/algorithm.md`, Prefill 2 and Options).

Everything is float32, the dtype of the attention masses. The recorded cases of the authors' code do not tell float32
from float64 here, and float64 is missing on some accelerators and slow on the rest. The one threshold where a last bit
would decide whether a sample is evicted from at all, `int(N * (1 - rho)) == 0`, is made a comparison of integers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgvkv_compile.config import Budgeting, EvictionConfig, name_of
from tgvkv_compile.ops.policy.bounds import Bounds, Sharing, fill
from tgvkv_compile.ops.policy.pyramid import pyramid
from tgvkv_compile.ops.policy.returned import check_tensor
from tgvkv_compile.ops.policy.same import same
from tgvkv_compile.ops.policy.share import budgeted
from tgvkv_compile.ops.policy.tvb import tvb
from tgvkv_compile.ops.policy.waterfill import waterfill

BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1

SHARINGS: dict[str, Sharing] = {"tvb": tvb, "waterfill": waterfill, "uniform": same, "pyramid": pyramid}
_UNMET = ("tvb", "uniform")
"""What rates are made of is what layers want, not what they get."""


class Allocation(NamedTuple):
    """What each layer of each sample keeps.

    Attributes:
        kept: `[B, L]` int64, `n_l`: prompt entries kept.
        rate: `[B, L]` float32, `r_l`: the share of all tokens that `decode="ratio"` keeps. Not clamped for `"tvb"`: it
            may be over 1. Exactly 1 in every layer of a sample that never loses anything.
    """

    kept: Tensor
    rate: Tensor


def _wants(budgeting: Budgeting | Callable[..., Any], weight: Tensor, bounds: Bounds) -> Tensor:
    """Entries that each layer wants, `[B, L]`; a function says by which weights the budget is filled."""
    if isinstance(budgeting, str):
        return SHARINGS[budgeting](weight, bounds)
    found = budgeting(weight)
    check_tensor(f"budgeting={name_of(budgeting)} returned", found, torch.float32, "[B, L]", tuple(weight.shape))
    return fill(found, bounds)


def allocate(mass: Tensor, lengths: Tensor, num_vision: Tensor, *, config: EvictionConfig) -> Allocation:
    """Shares the budget of each sample out over the layers.

    A sample without vision, or whose masses are all 0, weighs its layers alike. A sample so short, or with a budget so
    near its length, that `int(N * (1 - rho)) == 0` keeps everything for ever.

    Args:
        mass: `[B, L]` float32, `m_l` of [`scores_from_attention`][tgvkv_compile.ops.policy.rank.scores_from_attention].
        lengths: `[B]` int64, the `N` of each sample.
        num_vision: `[B]` int64, of [`vision_count`][tgvkv_compile.ops.token_types.vision_count].
        config: `budget`, `budget_of`, `budgeting`, `sink_tokens`; and `decode`, because in `"fixed"` mode a rate of 1
            must mean "never evicts": layers that merely keep all of their prompt get the float below 1 instead.
    """
    weight = _weights(mass, num_vision)
    length = lengths.to(torch.float32).unsqueeze(1)
    minimum = length.clamp(max=config.sink_tokens + 1)
    if config.budget_of == "all":
        wanted = _wants(config.budgeting, weight, Bounds(budgeted(length, config), minimum, length))
        # The released code rounds the evicted number, half to even.
        kept = length - torch.round(length - wanted) if config.budgeting == "tvb" else torch.round(wanted)
        kept = kept.clamp(minimum, length)
        rate = (wanted if config.budgeting in _UNMET else kept) / length.clamp(min=1.0)
    else:
        vision = num_vision.to(torch.float32).unsqueeze(1)
        none = torch.zeros_like(vision)
        wanted = _wants(config.budgeting, weight, Bounds(budgeted(vision, config), none, vision))
        chosen = torch.round(wanted).clamp(none, vision)
        kept = torch.maximum(length - vision + chosen, minimum)
        rate = kept / length.clamp(min=1.0)
    dense = _never_evicts(lengths, num_vision, config).unsqueeze(1)
    if config.decode == "fixed":
        rate = torch.where(rate == 1.0, BELOW_ONE, rate)
    return Allocation(torch.where(dense, length, kept).to(torch.int64), torch.where(dense, 1.0, rate))


def _weights(mass: Tensor, num_vision: Tensor) -> Tensor:
    """`w_l = m_l / sum_l m_l` `[B, L]`; `1 / L` where there is nothing to weigh."""
    total = mass.sum(1, keepdim=True)
    weighs = (num_vision.unsqueeze(1) > 0) & (total > 0)
    return torch.where(weighs, mass / torch.where(weighs, total, 1.0), 1.0 / mass.shape[1])


def _never_evicts(lengths: Tensor, num_vision: Tensor, config: EvictionConfig) -> Tensor:
    """`[B]` bool: `int(N * (1 - rho)) == 0`, in integers."""
    if not isinstance(config.limit, int):
        first = _first_evicting_length(config.limit)
        return torch.ones_like(lengths, dtype=torch.bool) if first is None else lengths < first
    if config.budget_of == "all":
        return lengths <= config.limit
    # N * (1 - budget / V) is at least 1 as soon as V > budget, because N >= V.
    return (num_vision <= config.limit) & (num_vision > 0)


def _first_evicting_length(ratio: float) -> int | None:
    """The smallest `N` with `int(N * (1 - ratio)) > 0` in float64; None if there is none."""
    evicted = 1.0 - ratio
    if evicted <= 0.0:
        return None
    length = max(1, int(1.0 / evicted) - 2)
    while int(length * evicted) == 0:
        length += 1
    return length


def _never_evicts_host(length: int, num_vision: int | None, config: EvictionConfig) -> bool:
    """Whether a sample of this size may be one that never loses anything (unknown `num_vision`: yes if any could)."""
    if not isinstance(config.limit, int):
        first = _first_evicting_length(config.limit)
        return first is None or length < first
    if config.budget_of == "all":
        return length <= config.limit
    return num_vision is None or 0 < num_vision <= config.limit


def _layer_bound(length: int, num_vision: int | None, config: EvictionConfig) -> float:
    """Upper bound on the mean over layers of `n_l`, before rounding up."""
    tokens = length if config.budget_of == "all" else num_vision
    if tokens is None:
        return float(length)
    share = float(min(config.limit, tokens)) if isinstance(config.limit, int) else tokens * config.limit
    minimum = min(config.sink_tokens + 1, length)
    if config.budget_of == "vision":
        bound = max(length - tokens, minimum) + share + 1.0
    elif config.budgeting == "tvb":
        bound = share + minimum + 1.0  # a layer below the minimum is lifted to it, and the others do not pay for it
    else:
        bound = max(share, minimum) + 1.0
    return min(float(length), bound)


def kept_bound(num_layers: int, length: int, *, config: EvictionConfig, num_vision: int | None) -> int:
    """Upper bound on `sum_l n_l` of a sample: at most `L * N * rho + (sink + 2) * L`, never above `L * N`.

    Holds for every sample of *at most* `length` tokens (with *at least* `num_vision` of them vision), so that the
    padded length of a batch may be given.

    Args:
        num_layers: `L`.
        length: `N`.
        config: The budget.
        num_vision: For `budget_of="vision"`, of [`vision_count`][tgvkv_compile.ops.token_types.vision_count]; None if
            unknown.
    """
    return min(num_layers * length, math.ceil(num_layers * _layer_bound(length, num_vision, config)))


def growth_bound(num_layers: int, length: int, new_tokens: int, *, config: EvictionConfig, num_vision: int | None) -> int:
    """Upper bound on what [`segment_capacity`][] adds to `n_l`, summed over layers.

    At most `L * rho * G + (sink + 1) * L` in `"ratio"` mode for `budgeting="tvb"` or `"uniform"`.

    Unlike [`kept_bound`][] it speaks of a sample of exactly `length` tokens (and exactly `num_vision` vision tokens): a
    shorter one can be entitled to more growth, up to all of its new tokens if it never evicts.

    Args:
        num_layers: `L`.
        length: `N`.
        new_tokens: `G`.
        config: The budget.
        num_vision: For `budget_of="vision"`; None if unknown.
    """
    everything = num_layers * new_tokens
    if config.decode == "keep" or _never_evicts_host(length, num_vision, config):
        return everything
    if config.decode == "fixed":
        return min(everything, num_layers * (config.sink_tokens + 1))
    # Per layer: capacity <= n + 1 + max(sink, 2 + G * r), see segment_capacity; the rates sum to at most L * rate.
    if config.budget_of == "all" and config.budgeting in _UNMET:
        rate = config.limit / max(length, 1) if isinstance(config.limit, int) else config.limit
    else:
        rate = _layer_bound(length, num_vision, config) / max(length, 1)
    return min(everything, math.ceil(num_layers * (rate * new_tokens + max(config.sink_tokens, 2) + 1)))


def segment_capacity(
    kept: Tensor, rate: Tensor, lengths: Tensor, new_tokens: int | Tensor, *, config: EvictionConfig
) -> Tensor:
    """Slots that each layer needs so that `new_tokens` further decode steps always find a free one.

    A step writes its token before it evicts, so this is one more than the longest length between steps. Write `n` for
    `kept`, `x` for `(N + G) * r`. A step that could evict but need not leaves at most `floor(x) + 1` entries; one that
    evicts leaves as many as there were. A step that finds nothing evictable has only sinks and protected entries:
    at most `sink + P` of them, where the `P` protected entries are among the `n`. So lengths stay within
    `max(n + sink, floor(x) + 1)`; `n + sink` is reached where the suffix covers the sinks (a prompt without vision). A
    segment that `crop` has emptied counts as one entry: the suffix is never empty, so the next token is protected.

    Args:
        kept: `[B, L]` int64, entries now, all protected ones included.
        rate: `[B, L]` float32, `r_l`.
        lengths: `[B]` int64, all tokens up to now.
        new_tokens: Steps to come, `G`: an int or `[B]` int64.
        config: `decode` and `sink_tokens`.

    Returns:
        `[B, L]` int64, at most `kept + new_tokens`.
    """
    total = (lengths + new_tokens).unsqueeze(1)
    all_kept = kept + (total - lengths.unsqueeze(1))
    if config.decode == "keep":
        return all_kept
    longest = torch.where(kept > 0, kept, 1) + config.sink_tokens  # no clamp: TensorRT clips floats only
    if config.decode == "fixed":
        return torch.where(rate == 1.0, all_kept, torch.minimum(all_kept, longest + 1))
    allowed = (total.to(torch.float32) * rate).to(torch.int64) + 1
    return torch.minimum(all_kept, torch.maximum(longest, allowed) + 1)
