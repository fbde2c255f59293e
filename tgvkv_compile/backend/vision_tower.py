"""Vision towers that dynamo cannot trace: they are left out of the compiled code, as `generate` leaves them."""

import inspect
import types
from typing import Any, TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)

_METHODS = ("get_image_features", "get_video_features")
"""What transformers' own `generate` calls to encode vision before the prefill."""


def leave_vision_uncompiled(model: Model) -> Model:
    """Keeps `get_image_features` and `get_video_features` of a model out of compiled code.

    Some vision towers read sizes from data (qwen, glm, pixtral), which dynamo refuses to trace. `generate` of transformers
    5.23 and newer encodes vision before the compiled model is called. Older ones, and direct calls with `pixel_values`,
    encode it inside: there the graph breaks at the tower, which runs as it is, and the decoder behind it is compiled.

    Args:
        model: A transformers vision-language model, compiled or not. It is changed in place; a copy of it takes that along.

    Returns:
        The same model.
    """
    for module in model.modules():
        for name in _METHODS:
            function = getattr(type(module), name, None)
            if inspect.isfunction(function) and name not in vars(module):
                # A bound method, so that `copy.deepcopy` binds the copy's to the copy.
                disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
                setattr(module, name, types.MethodType(disabled, module))
    return model


def encodes_before_prefill(model: Any) -> bool:
    """Whether `generate` of this model takes vision that was encoded before, and so runs the tower uncompiled."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters
