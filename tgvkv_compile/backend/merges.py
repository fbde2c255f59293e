"""Watches uncompiled model code merge vision features into token embeddings, and tells which tokens are vision."""

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tgvkv_compile.runtime.tracing import never_compile


class MergeWatch(TorchFunctionMode):
    """While it is active, follows embeddings from the lookup of the prompt's tokens to what is made of them.

    Followed are results of the embeddings' shape `[B, N, hidden]`. Vision is what a `masked_scatter`, a `where` or an
    assignment by index puts among them; `docs/algorithm.md` calls these places `V`. One vector `[hidden]` for every place that
    it is assigned to is a marker's (ovis2 learns those that stand around its pictures), and markers are text.
    """

    def __init__(self) -> None:
        super().__init__()
        # By id, with the tensor itself: an id is free again when its tensor is gone.
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, and takes note of what it does to embeddings."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "embedding":
            self.look_up(_argument(args, kwargs, 0, "input"), result)
        elif self._known:
            follow = _FOLLOWED.get(name)
            if follow is not None:
                follow(self, args, kwargs, result)
            else:
                self._derive(args, kwargs, result)
        return result

    def knows(self, embeds: object) -> bool:
        """Whether all that `embeds` are made of was seen."""
        return id(embeds) in self._known

    def vision(self, embeds: Tensor) -> Tensor | None:
        """Where vision stands among embeddings that are known, bool `[B, N, 1]`; None: nowhere."""
        return self._known[id(embeds)][1]

    def _put(self, embeds: Tensor, vision: Tensor | None) -> None:
        self._known[id(embeds)] = (embeds, vision)

    def look_up(self, tokens: object, embeds: object) -> None:
        """Takes note of an embedding lookup: `embeds` are of `tokens`, `[B, N]`, and none of them is vision yet."""
        if _is_embeddings(embeds) and isinstance(tokens, Tensor) and tokens.ndim == 2:
            self._put(embeds, None)

    def _derive(self, args: Any, kwargs: Any, result: Any) -> None:
        """Scaling, casting, adding: vision stays where it was."""
        if not _is_embeddings(result):
            return
        sources = [part for part in _tensors((args, kwargs)) if self.knows(part) and part.shape[:2] == result.shape[:2]]
        if sources:
            self._put(result, _union(*(self.vision(source) for source in sources)))

    def _scatter(self, args: Any, kwargs: Any, result: Any) -> None:
        embeds, mask = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "mask")
        if self.knows(embeds):
            self._put(result, _union(self.vision(embeds), _of_tokens(mask, embeds)))

    def _where(self, args: Any, kwargs: Any, result: Any) -> None:
        condition = _argument(args, kwargs, 0, "condition")
        chosen, other = _argument(args, kwargs, 1, "input"), _argument(args, kwargs, 2, "other")
        if not _is_embeddings(result) or condition is None:
            return
        if self.knows(chosen) == self.knows(other) or not (_is_embeddings(chosen) and _is_embeddings(other)):
            self._derive(args, kwargs, result)
            return
        embeds, mask = (other, condition) if self.knows(other) else (chosen, ~condition)
        self._put(result, _union(self.vision(embeds), _of_tokens(mask, embeds)))

    def _assign(self, args: Any, kwargs: Any, result: Any) -> None:
        embeds, index, values = args
        if self.knows(embeds) and isinstance(values, Tensor) and values.ndim > 1:
            self._put(embeds, _union(self.vision(embeds), _indexed(embeds, index)))

    def _index_put(self, args: Any, kwargs: Any, result: Any) -> None:
        embeds, indices = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "indices")
        if self.knows(embeds):
            marker = _argument(args, kwargs, 2, "values").ndim < 2
            self._put(result, self.vision(embeds) if marker else _union(self.vision(embeds), _indexed(embeds, tuple(indices))))


never_compile(MergeWatch.__torch_function__)

_FOLLOWED: dict[str, Callable[[MergeWatch, Any, Any, Any], None]] = {
    "masked_scatter": MergeWatch._scatter,
    "masked_scatter_": MergeWatch._scatter,
    "where": MergeWatch._where,
    "__setitem__": MergeWatch._assign,
    "index_put": MergeWatch._index_put,
    "index_put_": MergeWatch._index_put,
}


def _is_embeddings(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _argument(args: Any, kwargs: Any, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from _tensors(value)


def _of_tokens(mask: Tensor, embeds: Tensor) -> Tensor:
    """A mask that broadcasts to `[B, N, hidden]` as one of tokens, `[B, N, 1]`."""
    return mask.to(embeds.device).expand(embeds.shape).any(2, keepdim=True)


def _indexed(embeds: Tensor, index: Any) -> Tensor:
    """Which tokens an index of embeddings meets, `[B, N, 1]`."""
    met = torch.zeros(embeds.shape, dtype=torch.bool, device=embeds.device)
    met[index] = True
    return met.any(2, keepdim=True)


def _union(*masks: Tensor | None) -> Tensor | None:
    seen = [mask for mask in masks if mask is not None]
    if not seen:
        return None
    whole = seen[0]
    for mask in seen[1:]:
        whole = whole | mask
    return whole
