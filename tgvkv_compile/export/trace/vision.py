"""The vision encoder of families whose prefill takes pictures encoded, traced for pictures of one size."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tgvkv_compile.errors import UnsupportedGraphError
from tgvkv_compile.export.trace.families import GRID, PIXELS, encoded
from tgvkv_compile.private import disable_proxy_modes_tracing, make_fx, pytree


class _OnlyWhatDependsOn(TorchFunctionMode):
    """What does not depend on the inputs is computed while tracing, and stands in the graph as a constant.

    The size of a picture decides shapes (rows of windows, lengths of sequences), and so is a constant here.
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._tensors = list(inputs)  # kept alive: an id is unique only as long as its object lives
        self._ids = {id(tensor) for tensor in inputs}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if not any(id(leaf) in self._ids for leaf in pytree.tree_leaves((args, given))):
            with disable_proxy_modes_tracing():
                return function(*args, **given)
        result = function(*args, **given)
        found = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._tensors += found
        self._ids.update(map(id, found))
        return result


def traced_vision(model: Any, sample: Mapping[str, Any]) -> tuple[torch.export.ExportedProgram, dict[str, Tensor]]:
    """`(pixel_values) -> (image_features, deepstack_features_0, ...)` for pictures of the sample's size.

    Args:
        model: In eval mode.
        sample: With `pixel_values` and `image_grid_thw`.

    Returns:
        The program, and the sample's features by name, in order.

    Raises:
        UnsupportedGraphError: It cannot be traced.
    """
    pixels, grid = sample[PIXELS], sample[GRID]

    def features(given: Tensor) -> tuple[Tensor, ...]:
        with _OnlyWhatDependsOn((given,)):
            return tuple(encoded(model, {PIXELS: given, GRID: grid}).values())

    try:
        with torch.no_grad():
            gm = make_fx(features, tracing_mode="real", pre_dispatch=True)(pixels)
            return torch.export.export(gm, (pixels,), strict=False), encoded(model, sample)
    except Exception as error:  # torch has no common class of errors for what it cannot trace
        raise UnsupportedGraphError(f"the vision encoder cannot be traced: {error}") from error
