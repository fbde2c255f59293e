"""Tensors that are made of other tensors: quantised weights, sharded ones.

Dynamo leaves a function of such a tensor in the graph as it stands (`linear(x, weight)`), and the tensor's
`__torch_function__` says what it means when the graph is traced further, or run. Any other subclass's
`__torch_function__` dynamo follows itself; the graph holds what it did.

A handle of the cache is of the other kind. Where a graph took handles, dynamo calls what the backend gave with
`__torch_function__` switched off (torch 2.13), so that nothing is done twice, and the weights' would be lost with it.
"""

from typing import Any

import torch
from torch import Tensor

from tgvkv_compile.private import DisableTorchFunctionSubclass, is_traceable_wrapper_subclass


def as_graph_takes(value: Any) -> Any:
    """`value` as a graph takes it whose nodes ask `__torch_function__`: plain, where dynamo has followed it already."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter) or is_traceable_wrapper_subclass(value):
        return value
    with DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def first_storage(tensor: Tensor) -> Tensor:
    """The first of the tensors that `tensor` is made of which holds data; a plain tensor is its own."""
    while is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, names[0])
    return tensor
