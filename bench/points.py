"""One point of a table that many are measured for: compiled for itself, said if it does not fit into memory."""

import dataclasses
import gc
from typing import Any

import torch

from bench import torch_internals
from bench.contenders import Compiler, make_contenders
from bench.errors import BenchError
from bench.measure import measure
from bench.models import make_model
from bench.presets import Preset
from bench.ratios import ratios

OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: which of the three varies, and what all three are."""

    axis: str
    context: int
    batch: int
    budget: float


def at_point(preset: Preset, point: Point) -> Preset:
    """The preset there. One batch size for prefill and decode: it is compiled for once."""
    return dataclasses.replace(preset, context=point.context, batch=point.batch, prefill_batch=point.batch)


def measured(point: Point, preset: Preset, names: tuple[str, ...], compiler: Compiler) -> dict[str, Any]:
    """`rows` and `ratios` of the contenders there, or the `error` that kept them from being measured."""
    torch_internals.forget()
    gc.collect()
    if preset.device == "cuda":
        torch.cuda.empty_cache()
    here = at_point(preset, point)
    try:
        model = make_model(here)
        rows = measure(make_contenders(names, model, here, point.budget, compiler), model, here)
    except torch.OutOfMemoryError:
        return {"rows": {}, "ratios": {}, "error": OUT_OF_MEMORY}
    except BenchError as error:
        return {"rows": {}, "ratios": {}, "error": str(error)}
    return {"rows": rows, "ratios": ratios(rows), "error": None}
