"""The options of eviction: one frozen record, checked when it is made, and the checks that other options share."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from tgvkv_compile.errors import ConfigError, InternalError, UnknownOptionError

BudgetOf = Literal["all", "vision"]
Budgeting = Literal["tvb", "waterfill", "uniform", "pyramid"]
Ranking = Literal["twr", "snapkv", "h2o", "streaming", "knorm", "random"]
DecodeMode = Literal["ratio", "fixed", "keep"]
KVDtype = Literal["int8", "int4", "float8_e4m3fn"]
Lowering = Literal["inductor", "aot_eager", "eager"]
CompileMode = Literal["reduce-overhead", "max-autotune"]
OnUnsupported = Literal["raise", "passthrough"]

SINK_TOKENS = 4  # the authors' released code keeps the first four positions
BUDGET = 0.05


@dataclasses.dataclass(frozen=True)
class EvictionConfig:
    """What the eviction maths needs to know (`docs/algorithm.md`).

    Attributes:
        budget: A `float` in (0, 1] is the fraction of KV kept after prefill, averaged over layers; an `int` >= 1 is the
            number of tokens kept per layer on average (`rho = min(1, budget / N)`). None: 0.05, or what `memory` allows.
        budget_of: What the budget is a fraction of: the whole prompt's KV (`"all"`, the paper's main setting) or the
            vision tokens' KV, all text being kept (`"vision"`, the paper's Table 8).
        budgeting: How layers share it: `"tvb"` (paper section 4.1, as released), `"waterfill"` (same weights, the
            total is kept when layers clamp), `"uniform"`, `"pyramid"`, or a function from the layers' weights `[B, L]` to those
            by which the budget is filled.
        decode: What decoding evicts: `"ratio"` (as released), `"fixed"` (one in, one out) or `"keep"` (nothing).
        sink_tokens: How many first positions are always kept.
        ranking: Which tokens of a prompt stay (`docs/policies.md`): `"twr"` (as released), `"snapkv"`, `"h2o"`, `"streaming"`,
            `"knorm"`, `"random"`, or a function from a `Layer` to what it is `Ranked`.
        kv_dtype: How kept keys and values are held (`docs/quantised-cache.md`): `"int8"`, `"int4"`, `"float8_e4m3fn"`;
            None: in the model's own dtype. A budget counts tokens, whatever they are held in.
        memory: In place of `budget`, the bytes that a sample's kept keys and values may take after prefill, scales included: an
            `int`, or text such as `"64MiB"`. The budget is then the tokens per layer that fit (on each rank, those of its
            heads). Needs `budget_of="all"`.
    """

    budget: float | int | None = None
    budget_of: BudgetOf = "all"
    budgeting: Budgeting | Callable[..., Any] = "tvb"
    decode: DecodeMode = "ratio"
    sink_tokens: int = SINK_TOKENS
    ranking: Ranking | Callable[..., Any] = "twr"
    kv_dtype: KVDtype | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            self._take_memory(self.memory)
        else:
            if self.budget is None:
                object.__setattr__(self, "budget", BUDGET)
            _check_budget(self.budget)
        check_choice("budget_of", self.budget_of, BudgetOf)
        if not callable(self.budgeting):
            check_choice("budgeting", self.budgeting, Budgeting, otherwise="or give a function")
        check_choice("decode", self.decode, DecodeMode)
        check_count("sink_tokens", self.sink_tokens, minimum=0)
        if not callable(self.ranking):
            check_choice("ranking", self.ranking, Ranking, otherwise="or give a function")
        check_choice("kv_dtype", self.kv_dtype, KVDtype, optional=True)

    def _take_memory(self, memory: int | str) -> None:
        if self.budget is not None:
            raise ConfigError(f"budget={self.budget!r} and memory={memory!r} were both given; give one of them")
        if self.budget_of != "all":
            raise ConfigError(
                f"memory={memory!r} needs budget_of='all': with budget_of={self.budget_of!r} all text is kept, however long"
            )
        object.__setattr__(self, "memory", parse_bytes("memory", memory))

    @property
    def limit(self) -> float | int:
        """The budget.

        Raises:
            InternalError: Memory was given in its place, and how many tokens fit is known only with a model.
        """
        if self.budget is None:
            raise InternalError(f"memory={self.memory} has not become a budget yet")
        return self.budget

    def for_ranking(self) -> dict[str, Any]:
        """What a function in a graph that ranks one layer's tokens takes of it (`ops.policy.rank.rank_by_walk`)."""
        return {"budget": self.budget, "budget_of": self.budget_of, "ranking": self.ranking}

    def constants(self) -> dict[str, Any]:
        """What functions in a graph make such a record of again: plain values; who needs a function is handed it itself."""
        others = ("ranking", "kv_dtype", "memory")
        plain = {name: getattr(self, name) for name in names_of(EvictionConfig) if name not in others}
        if callable(self.budgeting):
            plain["budgeting"] = "waterfill"  # its bounds and rates are those of whatever is filled
        return plain


def read_eviction(budget: float | int | None, others: Mapping[str, Any], *, where: str) -> EvictionConfig:
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


_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(name: str, value: object) -> int:
    """A number of bytes from an int, or from text: a number with a unit, as in `"1.5 GiB"`.

    Raises:
        ConfigError: It is neither, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found is not None and found[2] in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2]])
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigError(f"{name}={value!r} is no size; give a number of bytes, or text such as '64MiB' (units: {units})")
    if size < 1:
        raise ConfigError(f"{name}={value!r} is less than one byte")
    return size


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
