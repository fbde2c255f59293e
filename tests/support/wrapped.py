"""A weight made of other tensors, as quantised weights are, without a library: only `linear` knows what to do with it."""

from typing import Any

import torch
from torch import Tensor, nn


class ScaledWeight(Tensor):
    """Rows of int8 and a factor for each, `[out, in]` and `[out, 1]`."""

    rows: Tensor
    factors: Tensor

    @staticmethod
    def __new__(cls: type, rows: Tensor, factors: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=factors.dtype, device=rows.device)

    def __init__(self, rows: Tensor, factors: Tensor) -> None:
        self.rows, self.factors = rows, factors

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ScaledWeight(rows={self.rows}, factors={self.factors})"

    @classmethod
    def of(cls, weight: Tensor) -> "ScaledWeight":
        factors = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / factors).round().to(torch.int8), factors)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["rows", "factors"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> "ScaledWeight":
        return cls(parts["rows"], parts["factors"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            given, weight, *bias = args
            result = given @ weight.rows.to(given.dtype).t() * weight.factors[:, 0]
            return result + bias[0] if bias and bias[0] is not None else result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(*(func(part) for part in (args[0].rows, args[0].factors)))
        raise NotImplementedError(f"{func} of a ScaledWeight")


def scale_weights(model: nn.Module) -> None:
    """Puts `ScaledWeight`s into all linear layers of the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(ScaledWeight.of(module.weight.detach()), requires_grad=False)
