"""Compiling before the first user comes."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.backend.request import blank_image, request_of
from tgvkv_compile.backend.wrappers import module_of
from tgvkv_compile.config import check_count
from tgvkv_compile.errors import ConfigError
from tgvkv_compile.private import OptimizedModule
from tgvkv_compile.runtime.tracing import compiled_for_handles

QUESTION = "What is this?"
IDS, MASK = "input_ids", "attention_mask"
PADDING = 3
"""Tokens; samples of a batch differ in length, as those of users do: transformers hands on no mask where all are the same."""


def warm_up(model: Any, inputs: Any, *, batch_sizes: Sequence[int] = (1,), new_tokens: int = 2) -> None:
    """Answers tiny requests, so that what real ones need is compiled.

    Call it as requests will call the model: on the same device, within the same `inference_mode` or autocast. Lengths, pictures
    and, for batches of several, the number of samples are dynamic: what one request has compiled serves all like it.

    Args:
        model: Compiled in place, by `tgvkv_compile.compile(model)` or `model.compile(backend=tgvkv_backend(...))`.
        inputs: One request of one sample as `generate` takes it, a mapping with `input_ids`, on the model's device; or the
            model's processor, which is then asked about a grey picture.
        batch_sizes: Of the requests, in this order. `(1, 2)` where batches of several will come: two stands for all of them.
        new_tokens: Length of the answers. Two are a prefill and a decode step.

    Raises:
        ConfigError: `model` was not compiled with this backend, `inputs` is not one sample's, or a number is out of range.
    """
    check_count("new_tokens", new_tokens, minimum=2)
    if not batch_sizes:
        raise ConfigError(f"batch_sizes={batch_sizes!r} names no batch size; give (1,), or (1, 2) where batches will come")
    for size in batch_sizes:
        check_count("batch_sizes", size, minimum=1)
    if isinstance(model, torch.nn.Module) and not hasattr(model, "generate"):
        model = module_of(model)
    _check_model(model)
    sample = _sample(model, inputs)
    with _as_it_was(model):
        for size in batch_sizes:
            model.generate(**_batch(sample, size), max_new_tokens=new_tokens, min_new_tokens=new_tokens)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, OptimizedModule):
        raise ConfigError(
            "warm_up() was given a model wrapped by torch.compile(), whose generate() runs uncompiled; compile it in place, by "
            "tgvkv_compile.compile(model), and give the model itself"
        )
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generate"):
        raise ConfigError(f"model is a {name}; warm_up() needs a transformers model with generate()")
    answering = module_of(model).modules()  # what was compiled for a wrapper alone, its generate() does not reach
    calls = [call for module in answering for call in (module._compiled_call_impl, vars(module).get("forward"))]
    if not any(call is not None and compiled_for_handles(call) for call in calls):
        raise ConfigError(
            f"model ({name}) was not compiled with this backend, so there is nothing to warm up; call "
            "tgvkv_compile.compile(model) or model.compile(backend=tgvkv_backend(...)) first"
        )


def _sample(model: Any, inputs: Any) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        if not callable(inputs):
            raise ConfigError(f"inputs is a {type(inputs).__name__}; give a mapping with input_ids, or the model's processor")
        inputs = request_of(inputs, [blank_image()], QUESTION).to(model.device, dtype=model.dtype)
    ids = inputs.get(IDS)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
        found = list(ids.shape) if isinstance(ids, Tensor) else ids
        raise ConfigError(f"inputs[{IDS!r}] is {found}; give one sample, [1, N], which batch_sizes repeats")
    return {MASK: torch.ones_like(ids), **inputs}


def _batch(sample: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The sample `size` times, by turns with a longer question and padded on the left.

    Tensors and lists of all samples, or of all their pictures, follow each other.
    """
    if size == 1:
        return dict(sample)
    parts = [_lengthened(sample, padded=place % 2 == 1) for place in range(size)]

    def joined(name: str) -> Any:
        first = parts[0][name]
        if isinstance(first, Tensor) and first.dim():
            return torch.cat([part[name] for part in parts])
        return first * size if isinstance(first, list) else first

    return {name: joined(name) for name in sample}


def _lengthened(sample: Mapping[str, Any], *, padded: bool) -> dict[str, Any]:
    """The last token, which is text, is put behind the question or, where it is padding, in front of everything."""
    shape = sample[IDS].shape

    def lengthened(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        more = [value[:, -1:]] * PADDING
        if not padded:
            return torch.cat([value, *more], dim=1)
        return torch.cat([torch.zeros_like(column) if name == MASK else column for column in more] + [value], dim=1)

    return {name: lengthened(name, value) for name, value in sample.items()}


@contextlib.contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what a request leaves behind: random states, and attributes such as the `rope_deltas` of Qwen models.

    Private attributes are torch's and stay: among them is how a module is called.
    """
    before = [(module, _public(module)) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, attributes in before:
            for name in _public(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _public(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}
