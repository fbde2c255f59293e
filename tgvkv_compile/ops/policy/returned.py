"""What a function of the user's must have returned."""

import torch
from torch import Tensor

from tgvkv_compile.errors import ConfigError


def check_tensor(said: str, value: object, dtype: torch.dtype, letters: str, shape: tuple[int, ...]) -> None:
    """Raises [`ConfigError`][] unless a function returned such a tensor.

    Args:
        said: Begins the message, up to what was found: `"ranking=mine returned score as"`.
        value: What it returned.
        dtype: What it must be.
        letters: Its shape in letters, such as `"[B, S]"`.
        shape: Its shape here.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{said} {found}; it must be {dtype} {letters}, here {shape} (docs/policies.md)")
