"""What a prefill of each family takes, and how an engine's tensors become a call of the model."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.errors import ConfigError, UnsupportedGraphError

IDS, MASK, POSITIONS, FEATURES = "input_ids", "attention_mask", "position_ids", "image_features"
PIXELS, GRID = "pixel_values", "image_grid_thw"
DEEPSTACK = "deepstack_features"


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of giving a prompt's pictures to an engine.

    Attributes:
        tensors: Inputs of the prefill beside tokens and mask.
        constants: Inputs whose values decide shapes, so that they are part of an engine: the size of a picture, say.
        position_rows: Rows of the rotary positions that are given, `[rows, B, N]`; 0 where they follow from the mask.
    """

    tensors: tuple[str, ...]
    constants: tuple[str, ...] = ()
    position_rows: int = 0

    @property
    def from_features(self) -> bool:
        """Whether the prefill takes pictures encoded."""
        return FEATURES in self.tensors


_OF_FEATURES = Family((POSITIONS, FEATURES), constants=(GRID,), position_rows=3)
FAMILIES: dict[str, Family] = {
    "llava": Family((PIXELS,)),
    "llava_onevision": Family((PIXELS,), constants=("image_sizes", "batch_num_images")),
    "qwen2_5_vl": _OF_FEATURES,
    "qwen3_vl": _OF_FEATURES,
}


def family_of(model: Any) -> Family:
    """The model's family.

    Raises:
        UnsupportedGraphError: It is none of those that can be exported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedGraphError(
            f"a model of type {kind!r} cannot be exported; {', '.join(FAMILIES)} can. torch.compile with tgvkv_backend takes it"
        )
    return FAMILIES[kind]


def engine_inputs(model: Any, family: Family, sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the prefill takes, of what the processor makes; pictures are encoded, and positions found, where it takes them so.

    Args:
        model: The model.
        family: Its family.
        sample: Inputs of a call.

    Returns:
        int64 `input_ids [B, N]` and `attention_mask [B, N]`, then the family's tensors in order.

    Raises:
        ConfigError: One that is needed is missing.
    """
    ids = _needed(sample, IDS)
    mask = sample.get(MASK)
    inputs = {IDS: ids, MASK: torch.ones_like(ids) if mask is None else mask.to(torch.int64)}
    if not family.from_features:
        return {**inputs, **{name: _needed(sample, name) for name in family.tensors}}
    positions = sample.get(POSITIONS)
    inputs[POSITIONS] = _positions(model, sample, inputs) if positions is None else positions[-family.position_rows :]
    return {**inputs, **(encoded(model, sample) if FEATURES not in sample else _given_features(sample))}


def constants_of(family: Family, sample: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of the sample's inputs that become part of the engine, as lists."""
    return {name: sample[name].tolist() for name in family.constants if sample.get(name) is not None}


def encode(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an engine that takes pictures encoded is given in place of what the processor made.

    Args:
        model: A transformers model of such a family (Qwen2.5-VL, Qwen3-VL).
        inputs: As the processor makes them.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` int64 `[3, B, N]`, `image_features [.., hidden]`, and for Qwen3-VL
        `deepstack_features_0`, ... alike.

    Raises:
        ConfigError: One that is needed is missing.
        UnsupportedGraphError: The model's family cannot be exported.
    """
    return engine_inputs(model, family_of(model), inputs)


def _needed(sample: Mapping[str, Any], name: str) -> Tensor:
    if not isinstance(sample.get(name), Tensor):
        raise ConfigError(
            f"the sample inputs have no tensor {name!r}; give what the processor makes of a prompt with a picture"
        )
    return sample[name]  # type: ignore[no-any-return]


def _given_features(sample: Mapping[str, Any]) -> dict[str, Tensor]:
    deep = sorted((name for name in sample if name.startswith(DEEPSTACK)), key=lambda name: int(name.rpartition("_")[2]))
    return {name: sample[name] for name in (FEATURES, *deep)}


@torch.no_grad()
def encoded(model: Any, sample: Mapping[str, Any]) -> dict[str, Tensor]:
    """The features that the model's encoder makes of `pixel_values` and `image_grid_thw`, by the names of engine inputs."""
    found = model.model.get_image_features(_needed(sample, PIXELS), _needed(sample, GRID), return_dict=True)
    features = {FEATURES: torch.cat(found.pooler_output)}
    for number, of_layer in enumerate(getattr(found, DEEPSTACK, None) or ()):
        # A tensor, or, in later releases of transformers, one per picture.
        features[f"{DEEPSTACK}_{number}"] = of_layer if isinstance(of_layer, Tensor) else torch.cat(of_layer)
    return features


def _positions(model: Any, sample: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """int64 `[3, B, N]`, as the model finds them of the pictures' grids; 0 at padding."""
    find = model.model.get_rope_index
    kinds = sample.get("mm_token_type_ids")
    if kinds is None:
        kinds = (inputs[IDS] == model.config.image_token_id).to(torch.int32)
    given: dict[str, Any] = {GRID: _needed(sample, GRID), MASK: inputs[MASK], "mm_token_type_ids": kinds}
    known = inspect.signature(find).parameters
    positions, _ = find(inputs[IDS], **{name: value for name, value in given.items() if name in known})
    return positions.to(torch.int64)  # type: ignore[no-any-return]


@contextmanager
def features_given(model: Any, features: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Within it, what the model's encoder gives for its pictures is what `features()` says."""

    def stand_in(*_: Any, **__: Any) -> Any:
        given = dict(features())
        first = given.pop(FEATURES)
        return _Features(pooler_output=(first,), deepstack_features=[_Rows((layer,)) for layer in given.values()])

    model.model.get_image_features = stand_in
    try:
        yield
    finally:
        del model.model.get_image_features


class _Rows(tuple[Tensor]):
    """A layer's features as models read them: some join one tensor per picture, earlier ones move the tensor of all."""

    __slots__ = ()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of the tensor."""
        return self[0].to(*args, **kwargs)


class _Features(SimpleNamespace):
    """What the model's encoder would return, as far as the model reads it."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Nothing: a model that returns tuples puts it at their end."""
        return ()
