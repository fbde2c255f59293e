"""Memory layout of tensors."""

from torch import Tensor


def in_order(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """`values`, dense in memory, dimensions from the outermost to the innermost in this order; a copy only where needed."""
    return values.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
