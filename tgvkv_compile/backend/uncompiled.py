"""What dynamo is kept out of: the methods of a model that read sizes from data, and that `generate` runs before its prefill.

A call of the model itself runs them within compiled code. Dynamo cannot trace them (the vision towers of Qwen-VL, GLM-V and
Pixtral turn `grid_thw` and `image_sizes` into lists), and it raises there instead of breaking the graph.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from tgvkv_compile.runtime.tracing import never_compile

METHODS = ("get_image_features", "get_video_features", "get_audio_features", "get_rope_index")
"""transformers' names: what encodes pictures, videos and sound, and what finds the positions of their tokens."""


def keep_uncompiled() -> None:
    """Makes dynamo break the graph at the `METHODS` of every model class that is loaded, and leave what they call alone.

    The classes stay as they are; what changes is what dynamo does with these functions, whatever the backend is.
    """
    for module in _subclasses(torch.nn.Module):
        for name in METHODS:
            method = vars(module).get(name)
            if inspect.isfunction(method):
                _keep_uncompiled(inspect.unwrap(method))  # decorators share their code with every method they are used on


@functools.cache
def _keep_uncompiled(method: Any) -> None:
    # What torch.compiler.disable puts on the wrapper that it makes; a wrapper would have to be put into the class.
    method._torchdynamo_disable = True
    method._torchdynamo_disable_msg = "tgvkv: it reads sizes from data, and generate() runs it uncompiled, too"
    never_compile(method)


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    child: type[Any]
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)
