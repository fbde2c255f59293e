"""Runs of exported engines, as the tests of the compiled path look at runs."""

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor

from tests.support.running import Kept, Trace
from tests.tensorrt.checking import problems_of_onnx
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.export.generator import Generator
from tgvkv_compile.export.trace.families import MASK, POSITIONS


def check_files(generator: Generator) -> None:
    """Every operator of the engines' ONNX files is one that TensorRT's parser takes."""
    for path in generator.folder.glob("*.onnx"):
        found = problems_of_onnx(onnx.load(path, load_external_data=False))
        assert found == [], f"{path.name}: {found}"


def kept_by(generator: Generator) -> Kept:
    """What the engine's cache holds."""
    manifest = generator.manifest
    layers = range(manifest.plan.num_layers)
    return [[generator.kept_positions(layer, sample).tolist() for layer in layers] for sample in range(manifest.batch_size)]


def run_engine(generator: Generator, inputs: dict[str, Tensor], steps: int, *, forced: Sequence[Tensor] | None = None) -> Trace:
    """Prefill and `steps` decode steps; arguments as of `tests.support.running.run`."""
    given = generator.checked(inputs)
    trace, valid = Trace(), given[MASK] != 0
    position = valid.sum(1)
    if POSITIONS in given:
        position = torch.where(valid, given[POSITIONS], -1).amax(dim=(0, 2)) + 1
    best = trace.add(generator.prefill(given), kept_by(generator))
    for step in range(steps):
        token = forced[step] if forced is not None else best
        logits = generator.decode(token[:, None], (position + step)[:, None])
        best = trace.add(logits, kept_by(generator))
    return trace


def compiled_answer(model: Any, inputs: dict[str, Tensor], budget: float | int, new_tokens: int, **options: Any) -> Tensor:
    """What stock `generate` answers with the compiled torch path: prompt and answer."""
    torch._dynamo.reset()
    model.compile(backend=tgvkv_backend(budget, lowering="eager", **options))
    try:
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    finally:
        model._compiled_call_impl = None
