"""The options of eviction: one frozen record, checked when it is made, and the checks that other options share."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from tgvkv_compile.errors import ConfigError, UnknownOptionError

BudgetOf = Literal["all", "vision"]
Budgeting = Literal["tvb", "waterfill", "uniform", "pyramid"]
Ranking = Literal["twr", "snapkv", "h2o", "streaming", "knorm", "random"]
DecodeMode = Literal["ratio", "fixed", "keep"]
Lowering = Literal["inductor", "aot_eager", "eager"]
CompileMode = Literal["reduce-overhead", "max-autotune"]
OnUnsupported = Literal["raise", "passthrough"]

SINK_TOKENS = 4  # the authors' released code keeps the first four positions


@dataclasses.dataclass(frozen=True)
class EvictionConfig:
    """What the eviction maths needs to know (`docs/algorithm.md`).

    Attributes:
        budget: A `float` in (0, 1] is the fraction of KV kept after prefill, averaged over layers; an `int` >= 1 is the
            number of tokens kept per layer on average (`rho = min(1, budget / N)`).
        budget_of: What the budget is a fraction of: the whole prompt's KV (`"all"`, the paper's main setting) or the
            vision tokens' KV, all text being kept (`"vision"`, the paper's Table 8).
        budgeting: How layers share it: `"tvb"` (paper section 4.1, as released), `"waterfill"` (same weights, the
            total is kept when layers clamp), `"uniform"`, `"pyramid"`, or a function from the layers' weights `[B, L]` to those
            by which the budget is filled.
        decode: What decoding evicts: `"ratio"` (as released), `"fixed"` (one in, one out) or `"keep"` (nothing).
        sink_tokens: How many first positions are always kept.
        ranking: Which tokens of a prompt stay (`docs/policies.md`): `"twr"` (as released), `"snapkv"`, `"h2o"`, `"streaming"`,
            `"knorm"`, `"random"`, or a function from a `Layer` to what it is `Ranked`.
    """

    budget: float | int = 0.05
    budget_of: BudgetOf = "all"
    budgeting: Budgeting | Callable[..., Any] = "tvb"
    decode: DecodeMode = "ratio"
    sink_tokens: int = SINK_TOKENS
    ranking: Ranking | Callable[..., Any] = "twr"

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        check_choice("budget_of", self.budget_of, BudgetOf)
        if not callable(self.budgeting):
            check_choice("budgeting", self.budgeting, Budgeting, otherwise="or give a function")
        check_choice("decode", self.decode, DecodeMode)
        check_count("sink_tokens", self.sink_tokens, minimum=0)
        if not callable(self.ranking):
            check_choice("ranking", self.ranking, Ranking, otherwise="or give a function")

    def for_ranking(self) -> dict[str, Any]:
        """What a function in a graph that ranks one layer's tokens takes of it (`ops.policy.rank.rank_by_walk`)."""
        return {"budget": self.budget, "budget_of": self.budget_of, "ranking": self.ranking}

    def constants(self) -> dict[str, Any]:
        """What functions in a graph make such a record of again: plain values; who needs a function is handed it itself."""
        plain = {name: getattr(self, name) for name in names_of(EvictionConfig) if name != "ranking"}
        if callable(self.budgeting):
            plain["budgeting"] = "waterfill"  # its bounds and rates are those of whatever is filled
        return plain


def read_eviction(budget: float | int, others: Mapping[str, Any], *, where: str) -> EvictionConfig:
    """The record of a budget and other options by name.

    Args:
        budget: See `EvictionConfig`.
        others: Its other fields; those left out have their defaults.
        where: Who takes them, for the message.

    Raises:
        ConfigError: An option has a value that cannot be used.
        UnknownOptionError: There is no such option.
    """
    check_names(others, names_of(EvictionConfig), where=where)
    return EvictionConfig(budget, **others)


def names_of(record: type) -> tuple[str, ...]:
    """The names of the fields of a record's class."""
    return tuple(field.name for field in dataclasses.fields(record))


def name_of(policy: str | Callable[..., Any]) -> str:
    """Of a policy: its name, or that of the function."""
    return policy if isinstance(policy, str) else getattr(policy, "__qualname__", repr(policy))


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ConfigError(
            f"budget={budget!r} is a {type(budget).__name__}; give a float in (0, 1] (fraction of KV kept) or an int >= 1 "
            "(tokens kept per layer on average)"
        )
    if isinstance(budget, int):
        if budget < 1:
            raise ConfigError(f"budget={budget!r} is out of range; an int budget is tokens per layer and must be >= 1")
    elif math.isnan(budget) or not 0.0 < budget <= 1.0:
        raise ConfigError(
            f"budget={budget!r} is out of range; a float budget is the fraction of KV kept and must lie in (0, 1]; "
            "for a number of tokens per layer give an int"
        )


def check_choice(name: str, value: object, choices: Any, *, optional: bool = False, otherwise: str = "") -> None:
    """Raises [`ConfigError`][] unless `value` is one of the literals `choices` (or None where `optional`)."""
    allowed = get_args(choices)
    if value in allowed or (optional and value is None):
        return
    text = ", ".join(repr(choice) for choice in ((None, *allowed) if optional else allowed))
    raise ConfigError(f"{name}={value!r} is not known; choose one of {text}{', ' if otherwise else ''}{otherwise}")


def check_count(name: str, value: object, *, minimum: int) -> None:
    """Raises [`ConfigError`][] unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be an int >= {minimum}")


def check_names(options: Mapping[str, object], known: tuple[str, ...], *, where: str) -> None:
    """Raises [`UnknownOptionError`][] for an option that `where` does not have, with the nearest name it has."""
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UnknownOptionError(f"unknown option {name!r} of {where}{hint}. Known options: {', '.join(known)}")
