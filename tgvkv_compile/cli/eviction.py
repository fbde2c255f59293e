"""The options of eviction on the command line, written once for all commands that take them."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tgvkv_compile.config import Budgeting, BudgetOf, DecodeMode, EvictionConfig, KVDtype, Ranking

Eviction = dict[str, Any]
"""Fields of `EvictionConfig` by name; `budget` is text, which `cli.inputs.read_budget` reads."""

Decode = Annotated[DecodeMode, typer.Option(help="What decoding evicts: by ratio, one in one out, or nothing.")]

_OPTIONS: dict[str, Any] = {
    "budget": Annotated[
        str | None, typer.Option(help="KV kept: 0.05, the default, is a fraction, 64 is tokens per layer on average.")
    ],
    "budget_of": Annotated[
        BudgetOf, typer.Option(help="What the fraction is of: all of the prompt's KV, or the vision tokens' KV.")
    ],
    "ranking": Annotated[
        Ranking, typer.Option(help="Which tokens of the prompt stay: twr is TGV-KV's, the others are baselines.")
    ],
    "budgeting": Annotated[Budgeting, typer.Option(help="How the layers share the budget.")],
    "decode": Decode,
    "kv_dtype": Annotated[KVDtype | None, typer.Option(help="How kept KV is held: quantised, or as the model's own dtype.")],
    "memory": Annotated[str | None, typer.Option(help="Bytes per sample in place of a budget, such as 64MiB.")],
}


def with_eviction(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of eviction, in the place of its parameter `eviction`, which gets what was given."""

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(eviction={name: given.pop(name) for name in _OPTIONS}, **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "eviction":
            parameters += [_parameter(name, kind) for name, kind in _OPTIONS.items()]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads both
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameter(name: str, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(EvictionConfig, name), annotation=kind)
