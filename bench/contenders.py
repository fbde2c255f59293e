"""What is compared: the same weights, run in several ways."""

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor

import tgvkv_compile
from bench.errors import BenchError
from bench.models import Prompt
from bench.presets import Preset
from tgvkv_compile.config import KVDtype

Compiler = Literal["inductor", "eager"]

QUANTISED = {f"tgvkv-{kv_dtype}": kv_dtype for kv_dtype in get_args(KVDtype)}
"""`tgvkv` with each `kv_dtype`, at the same budget of tokens."""
ORDER = ("hf-eager", "inductor-full", "inductor-static", "tgvkv", "tgvkv-capped", *QUANTISED, "floor", "floor-static")
"""All there are. `tgvkv-capped` holds little in a prefill; `floor-static` is the lower bound that CUDA graphs can replay."""
CAP = 2.0
"""`prefill_cap` of `tgvkv-capped`."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: One of `ORDER`.
        prefill: The model, for a prompt; None for a lower bound, which has none.
        decode: The model, for a token.
        new_cache: Given the prompt and how many tokens may follow, the cache to call the model with.
        compiled: Whether a first call compiles.
        keeps_cache: Whether later requests get the same cache again.
    """

    name: str
    prefill: Callable[..., Any] | None
    decode: Callable[..., Any]
    new_cache: Callable[[Prompt, int], Any]
    compiled: bool = True
    keeps_cache: bool = False


def kept_tokens(budget: float, length: int) -> int:
    """Entries that a layer keeps of a prompt, on average: what the lower bound's cache holds."""
    return max(1, round(budget * length))


def default_names(device: str) -> tuple[str, ...]:
    """The rows of a run that names none: no variant of `tgvkv`, and `floor-static` only where there are CUDA graphs."""
    return tuple(name for name in ORDER if not name.startswith("tgvkv-") and (device == "cuda" or name != "floor-static"))


def make_contenders(
    names: tuple[str, ...], model: Any, preset: Preset, budget: float, compiler: Compiler = "inductor"
) -> list[Contender]:
    """Makes contenders that share the model's weights and nothing else.

    Args:
        names: Which, in the order to run them.
        model: Of the preset.
        preset: What is measured.
        budget: Fraction of KV that `tgvkv` and the lower bounds keep.
        compiler: What graphs are lowered to. `"eager"` shows in seconds whether everything runs; its times say nothing.

    Raises:
        BenchError: There is no such contender, or two are the same.
    """
    unknown = [name for name in names if name not in ORDER]
    if unknown:
        raise BenchError(f"no contender {unknown[0]!r}; there are {', '.join(ORDER)}")
    if len(set(names)) < len(names) or not names:
        raise BenchError(f"contenders {','.join(names)!r}: name each one once, and at least one")
    stock: dict[str, Any] = {"backend": compiler}
    graphs = {"mode": "reduce-overhead"} if preset.device == "cuda" and compiler == "inductor" else {}
    ours: dict[str, dict[str, Any]] = {
        "tgvkv": {},
        "tgvkv-capped": {"prefill_cap": CAP},
        **{name: {"kv_dtype": kv_dtype} for name, kv_dtype in QUANTISED.items()},
    }
    # They set dynamo's process-wide flags, so they are made first: all contenders are compiled under the same ones.
    backends = {
        name: tgvkv_compile.tgvkv_backend(budget=budget, lowering=compiler, **graphs, **options)
        for name, options in ours.items()
        if name in names
    }
    makers: dict[str, Callable[[], Contender]] = {
        "hf-eager": lambda: _eager(model),
        "inductor-full": lambda: _full(model, stock),
        "inductor-static": lambda: _static(model, preset, stock, graphs),
        "floor": lambda: _lower_bound(model, preset, budget, stock),
        "floor-static": lambda: _lower_bound_static(model, preset, budget, {**stock, **graphs}),
    }
    return [_tgvkv(model, name, backends[name]) if name in backends else makers[name]() for name in names]


def _eager(model: Any) -> Contender:
    call = _own_forward(model, "eager")
    return Contender("hf-eager", call, call, _dynamic, compiled=False)


def _full(model: Any, options: dict[str, Any]) -> Contender:
    call = torch.compile(_own_forward(model, "full"), **options)
    return Contender("inductor-full", call, call, _dynamic)


def _static(model: Any, preset: Preset, options: dict[str, Any], graphs: dict[str, Any]) -> Contender:
    caches: dict[tuple[int, int], Any] = {}

    def cache(prompt: Prompt, steps: int) -> Any:
        # One per batch size, used again by each request: CUDA graphs are recorded for its addresses.
        key = (prompt.batch, prompt.length + steps)
        if key not in caches:
            caches[key] = _static_cache(model, preset, *key)
        caches[key].reset()
        return caches[key]

    # As transformers' generate does: only decode is replayed, a prompt's pass gains nothing by it.
    prefill = torch.compile(_own_forward(model, "static_prefill"), **options)
    decode = torch.compile(_own_forward(model, "static_decode"), **options, **graphs)
    return Contender("inductor-static", prefill, decode, cache, keeps_cache=True)


def _tgvkv(model: Any, name: str, backend: Any) -> Contender:
    call = torch.compile(_own_forward(model, name.replace("-", "_")), backend=backend)
    return Contender(name, call, call, _dynamic)


def _lower_bound(model: Any, preset: Preset, budget: float, options: dict[str, Any]) -> Contender:
    def cache(prompt: Prompt, steps: int) -> Any:
        made = transformers.DynamicCache(config=model.config)
        for layer in range(preset.layers):
            made.update(*_random_entries(preset, prompt.batch, kept_tokens(budget, prompt.length)), layer)
        return made

    return Contender("floor", None, torch.compile(_own_forward(model, "floor"), **options), cache)


def _lower_bound_static(model: Any, preset: Preset, budget: float, options: dict[str, Any]) -> Contender:
    caches: dict[tuple[int, int], Any] = {}

    def cache(prompt: Prompt, steps: int) -> Any:
        kept = kept_tokens(budget, prompt.length)
        key = (prompt.batch, kept + steps)
        if key not in caches:
            caches[key] = _static_cache(model, preset, *key)
        caches[key].reset()
        for layer in range(preset.layers):
            caches[key].update(*_random_entries(preset, prompt.batch, kept), layer)
        return caches[key]

    decode = torch.compile(_own_forward(model, "floor_static"), **options)
    return Contender("floor-static", None, decode, cache, keeps_cache=True)


def _dynamic(prompt: Prompt, steps: int) -> None:
    """None: the model makes a `DynamicCache` itself, as it does for `generate`."""


def _static_cache(model: Any, preset: Preset, batch: int, length: int) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    where = {"dtype": getattr(torch, preset.dtype), "device": torch.device(preset.device)}
    cache.early_initialization(batch_size=batch, num_heads=preset.kv_heads, head_dim=preset.head_dim, **where)
    return cache


def _random_entries(preset: Preset, batch: int, length: int) -> tuple[Tensor, Tensor]:
    shape = (batch, preset.kv_heads, length, preset.head_dim)
    where = {"dtype": getattr(torch, preset.dtype), "device": preset.device}
    return torch.randn(shape, **where), torch.randn(shape, **where)


def _own_forward(model: Any, name: str) -> Callable[..., Any]:
    """The model's call as a function that dynamo has not seen yet.

    Dynamo keeps compiled code, and what it has learnt about sizes that vary, by function. Contenders that shared one
    would be compiled for sizes that others were called with.
    """
    own = _sharing_weights(model)

    def forward(**inputs: Any) -> Any:
        return own(**inputs)

    code = forward.__code__.replace(co_name=f"forward_{name}")
    return types.FunctionType(code, forward.__globals__, f"forward_{name}", None, forward.__closure__)


def _sharing_weights(model: Any) -> Any:
    """A copy of the modules around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
