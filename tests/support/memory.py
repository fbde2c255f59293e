"""Counting the memory of live tensors, not that of anybody's books."""

import gc
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a live tensor on the CPU has, by address."""
    gc.collect()
    found: dict[int, int] = {}
    things = gc.get_objects()
    # By kinds, of which there are few. Not isinstance: it would ask lazily imported modules and proxies for their class.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor)}
    for thing in (thing for thing in things if type(thing) in kinds):
        if thing.layout is not torch.strided or thing.device.type != "cpu":
            continue
        try:
            storage = thing.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # functional and other wrappers without data
            continue
        if address:
            found[address] = size
    return found


def new_bytes(before: dict[int, int], *, at_least: int = 0) -> int:
    """Bytes of storages that live now and did not before, of those of `at_least` bytes."""
    new = {address: size for address, size in live_storages().items() if before.get(address) != size}
    return sum(size for size in new.values() if size >= at_least)


class Watch:
    """Live bytes since it was made."""

    def __init__(self) -> None:
        self._before: dict[int, int] = live_storages()

    def bytes(self, *, at_least: int = 0) -> int:
        """Bytes of the storages of `at_least` bytes that have come since."""
        return new_bytes(self._before, at_least=at_least)


def total_live() -> int:
    """Bytes of all live storages."""
    return sum(live_storages().values())


def full_bytes(model: Any, tokens: int, batch: int = 1) -> int:
    """What an uncompressed KV cache of `tokens` would take."""
    text = model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_key_value_heads * head_dim * model.dtype.itemsize
    return batch * tokens * text.num_hidden_layers * per_token
