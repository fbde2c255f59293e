"""How many cache slots each layer of an exported model has."""

import dataclasses
import json
from typing import Any, get_args

import torch
from torch import Tensor

from tgvkv_compile.config import Budgeting, EvictionConfig, Ranking, check_count, name_of
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.ops.eviction.budgeting import Allocation, allocate, segment_capacity
from tgvkv_compile.ops.static.capacities import fit_allocation, prompt_room

_FORMAT = "tgvkv-budget-plan-1"
_FIELDS = ("capacities", "max_prompt", "max_new_tokens", "eviction")


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """Capacities that an engine is built with; budgets are decided at run time and clipped to them.

    Attributes:
        capacities: Slots of each layer: the prompt entries it keeps, and those that decoding adds.
        max_prompt: The longest prompt, in tokens.
        max_new_tokens: The most decode steps, each of which must find a free slot.
        eviction: The eviction options.
    """

    capacities: tuple[int, ...]
    max_prompt: int
    max_new_tokens: int
    eviction: EvictionConfig

    def __post_init__(self) -> None:
        check_count("max_prompt", self.max_prompt, minimum=1)
        check_count("max_new_tokens", self.max_new_tokens, minimum=0)
        if not self.capacities:
            raise ConfigError("capacities=() names no layer; give the slots of each layer that evicts")
        check_exportable(self.eviction)
        needed = _least_capacity(self.eviction, self.max_new_tokens)
        for layer, capacity in enumerate(self.capacities):
            check_count(f"capacities[{layer}]", capacity, minimum=1)
            if capacity < needed:
                raise ConfigError(
                    f"capacities[{layer}]={capacity} is too small: sink and last tokens and {self.max_new_tokens} decode steps "
                    f"with decode={self.eviction.decode!r} take {needed} slots; raise the budget or the capacity, or lower "
                    "max_new_tokens or sink_tokens"
                )

    @classmethod
    def uniform(
        cls, num_layers: int, eviction: EvictionConfig, *, max_prompt: int, max_new_tokens: int, num_vision: int = 0
    ) -> "BudgetPlan":
        """The same capacity for every layer: what a uniform budget keeps of the longest prompt, and its growth.

        Args:
            num_layers: L.
            eviction: The eviction options; how they share the budget out at run time may be another way.
            max_prompt: The longest prompt, in tokens.
            max_new_tokens: The most decode steps.
            num_vision: With `budget_of="vision"`, the fewest vision tokens of such a prompt; 0: all of it may be text.

        Raises:
            ConfigError: A number is out of range.
        """
        check_count("num_layers", num_layers, minimum=1)
        check_count("max_prompt", max_prompt, minimum=1)
        check_count("max_new_tokens", max_new_tokens, minimum=0)
        check_count("num_vision", num_vision, minimum=0)
        if num_vision > max_prompt:
            raise ConfigError(f"num_vision={num_vision} is more than max_prompt={max_prompt}; it counts tokens of that prompt")
        alike = dataclasses.replace(eviction, budgeting="uniform")
        lengths = torch.tensor([max_prompt])
        wish = allocate(torch.ones(1, 1), lengths, torch.tensor([num_vision]), config=alike)
        capacity = int(segment_capacity(wish.kept, wish.rate, lengths, max_new_tokens, config=alike))
        return cls(
            (max(capacity, _least_capacity(eviction, max_new_tokens)),) * num_layers, max_prompt, max_new_tokens, eviction
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.capacities)

    def fit(self, allocation: Allocation, lengths: Tensor) -> Allocation:
        """What each layer keeps under this plan: see [`fit_allocation`][tgvkv_compile.ops.static.capacities.fit_allocation].

        Args:
            allocation: What budgeting wants, `[B, L]`.
            lengths: int64 `[B]`, tokens of each sample, at most `max_prompt`.

        Raises:
            ConfigError: It is for another number of layers.
        """
        if allocation.kept.shape[1] != self.num_layers:
            raise ConfigError(
                f"the plan has capacities for {self.num_layers} layers, the budgets are for {allocation.kept.shape[1]}; "
                "make a plan for this model"
            )
        return fit_allocation(allocation, lengths, self.capacities, self.max_new_tokens, config=self.eviction)

    def to_json(self) -> str:
        """The plan as text that [`BudgetPlan.from_json`][] takes."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "BudgetPlan":
        """Reads what [`BudgetPlan.to_json`][] wrote.

        Raises:
            ConfigError: It is no such text, or what it says cannot be.
        """
        try:
            read: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the budget plan is not JSON ({error}); give what BudgetPlan.to_json() wrote") from error
        if not isinstance(read, dict) or read.get("format") != _FORMAT:
            found = read.get("format") if isinstance(read, dict) else type(read).__name__
            raise ConfigError(f"the budget plan has format={found!r}, not {_FORMAT!r}; give what BudgetPlan.to_json() wrote")
        wrong = set(read) ^ {"format", *_FIELDS}
        if wrong:
            raise ConfigError(f"the budget plan lacks, or has too many, fields: {', '.join(sorted(wrong))}; it has {_FIELDS}")
        capacities, eviction = read["capacities"], read["eviction"]
        if not isinstance(capacities, list):
            raise ConfigError(f"capacities={capacities!r} of the budget plan must be a list of ints, one per layer")
        known = {field.name for field in dataclasses.fields(EvictionConfig)}
        if isinstance(eviction, dict):
            for name in ("ranking", "kv_dtype", "memory"):  # plans are older than these
                eviction.setdefault(name, getattr(EvictionConfig, name))
        if not isinstance(eviction, dict) or set(eviction) != known:
            raise ConfigError(f"eviction={eviction!r} of the budget plan must have exactly {', '.join(sorted(known))}")
        return cls(tuple(capacities), read["max_prompt"], read["max_new_tokens"], EvictionConfig(**eviction))


def check_exportable(eviction: EvictionConfig) -> None:
    """Raises [`ConfigError`][tgvkv_compile.errors.ConfigError] for options that engines do not have, with the reason."""
    for option, choices in (("ranking", Ranking), ("budgeting", Budgeting)):
        policy = getattr(eviction, option)
        if not isinstance(policy, str):
            raise ConfigError(
                f"{option}={name_of(policy)} is a function, which a plan's JSON cannot hold; export takes it by name: "
                + ", ".join(map(repr, get_args(choices)))
            )
    if eviction.kv_dtype is not None:
        raise ConfigError(
            f"kv_dtype={eviction.kv_dtype!r} is not exported: engines read and write keys and values in the model's own dtype; "
            "leave it out"
        )
    if eviction.memory is not None:
        raise ConfigError(
            f"memory={eviction.memory!r} is not exported: an engine's slots are set by its budget plan; give a budget, or a "
            "plan whose capacities fit"
        )


def _least_capacity(eviction: EvictionConfig, max_new_tokens: int) -> int:
    """Slots that leave a prompt room for its forced tokens and nothing else."""
    return eviction.sink_tokens + 1 - prompt_room(0, max_new_tokens, config=eviction)
