"""Logical handles: tensors of the full logical shape that hold a few bytes and stand for a compact cache.

A handle may be passed around and stored (`DynamicCache` does), asked for its shape, dtype and device, and given to a
graph that was rewritten for it. Batch operations and `crop` act on the compact cache. Everything else raises: a handle
holds NaN, and no number may ever be computed from it.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tgvkv_compile.errors import CacheError
from tgvkv_compile.private import DisableTorchFunction, graph_break, maybe_mark_dynamic, parse_to
from tgvkv_compile.runtime.compact import CompactCache
from tgvkv_compile.runtime.tracing import never_compile, traced_for_handles

Role = Literal["key", "value"]


class LogicalKV(Tensor):
    """Stands for one layer's keys or values, `[B, Hkv, S, D]`, S the logical length.

    Attributes:
        compact: The compact cache.
        layer: Which of its layers.
        role: `"key"` or `"value"`.
    """

    compact: CompactCache
    layer: int
    role: Role

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Steps aside for queries of metadata and for graphs of our backends; honours batch operations; else raises.

        Torch function modes have had their turn when torch comes here, so stepping aside leaves them, too: where dynamo
        traces under a mode (`torch.set_default_device` is one), a query would come here again, without end.

        A graph that goes to another backend would compute on NaN, so dynamo's trace ends here and the error is raised by
        the same operation in eager code.
        """
        kwargs = kwargs or {}
        compiling = torch.compiler.is_dynamo_compiling()
        name = _name(func)
        if name in _METADATA or (compiling and traced_for_handles()):
            with DisableTorchFunction():
                return func(*args, **kwargs)
        if compiling:
            graph_break(msg=f"{name}() on a KV cache compressed by tgvkv, in a graph for another backend")
        honour = _HONOURED.get(name)
        if honour is not None and args and isinstance(args[0], LogicalKV):
            return honour(*args, **kwargs)
        raise CacheError(
            f"{name}() was called on the keys or values of a KV cache compressed by tgvkv: they are handles without data. "
            "If this is model code, it runs uncompiled, or compiled by another backend, on a compressed cache: compile the "
            "model with this backend (a function around it needs functools.wraps), and see with TORCH_LOGS=recompiles whether "
            "dynamo fell back to eager. If it is yours, use tgvkv_compile.inspect_cache(...)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Names the layer and the shape; shows no data."""
        shape = tuple(self.shape)
        return f"LogicalKV({self.role} of layer {self.layer}, shape={shape}, dtype={self.dtype}, device={self.device})"

    def __format__(self, format_spec: str) -> str:
        """As `repr` where no number is asked for."""
        return repr(self) if not format_spec else str(super().__format__(format_spec))  # type: ignore[no-untyped-call]

    def as_subclass(self, cls: Any) -> Any:
        """Refused: torch would hand out the filler without asking `__torch_function__`."""
        raise CacheError(f"as_subclass({cls.__name__}) of a handle of a compressed KV cache: it holds no data")

    def __deepcopy__(self, memo: dict[int, Any]) -> "LogicalKV":
        """A handle on a copy of the compact cache; all handles copied together share it."""
        compact = memo.get(id(self.compact))
        if compact is None:
            self.compact.usable()
            compact = memo[id(self.compact)] = self.compact.clone()
        handle = make_handle(compact, self.layer, self.role)
        memo[id(self)] = handle
        return handle

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Handles cannot be pickled."""
        raise CacheError("a KV cache compressed by tgvkv cannot be pickled; keep the prompt and prefill again")


never_compile(LogicalKV.__torch_function__.__func__)  # type: ignore[attr-defined]


def make_handle(compact: CompactCache, layer: int, role: Role) -> LogicalKV:
    """A handle of the compact cache's present logical length."""
    arena, form = compact.state.key_arena, compact.forms.key
    batch, heads = arena.shape[:2]
    with torch.inference_mode(False):
        filler = torch.full((), float("nan"), dtype=form.model, device=arena.device)
        handle = torch.Tensor._make_subclass(LogicalKV, filler.expand(batch, heads, compact.logical_length, form.dim))
    handle.compact, handle.layer, handle.role = compact, layer, role
    for dim in (0, 2):
        maybe_mark_dynamic(handle, dim)
    return handle


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name


_METADATA = frozenset(
    {
        *("size", "dim", "ndim", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous"),
        *(
            "shape",
            "dtype",
            "device",
            "layout",
            "requires_grad",
            "is_cuda",
            "is_cpu",
            "is_sparse",
            "is_meta",
            "is_leaf",
        ),
        *(
            "is_floating_point",
            "is_complex",
            "get_device",
            "untyped_storage",
            "data_ptr",
            "_version",
            "grad_fn",
            "grad",
        ),
        *("is_inference", "is_quantized", "is_nested", "__len__", "__hash__", "is_mkldnn", "is_mps", "is_xla", "names"),
        *(
            "itemsize",
            "nbytes",
            "_backward_hooks",
            "is_shared",
            "is_pinned",
            "_is_view",
            "_base",
            "retains_grad",
            "is_conj",
            "is_neg",
        ),
    }
)


def _select(handle: LogicalKV, indices: Any) -> LogicalKV:
    indices = torch.as_tensor(indices, device=handle.device)
    if indices.dtype == torch.bool:
        indices = indices.nonzero()[:, 0]
    return make_handle(handle.compact.select(indices.reshape(-1)), handle.layer, handle.role)


def _index_select(handle: LogicalKV, dim: int, index: Tensor) -> LogicalKV:
    if dim not in (0, -4):
        raise CacheError(f"index_select(dim={dim}) on a compressed KV cache: only the batch (dim=0) can be selected")
    return make_handle(handle.compact.select(index), handle.layer, handle.role)


def _repeat_interleave(handle: LogicalKV, repeats: Any, dim: int | None = None, **_: Any) -> LogicalKV:
    if dim not in (0, -4) or not isinstance(repeats, int):
        raise CacheError(
            f"repeat_interleave(repeats={repeats!r}, dim={dim}) on a compressed KV cache: only whole numbers of copies of "
            "the batch (dim=0) can be made"
        )
    return make_handle(handle.compact.repeat(repeats), handle.layer, handle.role)


def _getitem(handle: LogicalKV, index: Any) -> LogicalKV:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        position = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[position : position + 1] = [slice(None)] * (4 - len(parts) + 1)
    parts += [slice(None)] * (4 - len(parts))
    batch, heads, length, dim = parts if len(parts) == 4 else (None, None, None, None)
    whole = slice(None)
    if heads == whole and dim == whole and isinstance(length, slice) and length.start in (None, 0) and length.step is None:
        stop = length.indices(handle.shape[2])[1]
        result = handle
        if stop != handle.shape[2]:
            result = make_handle(handle.compact.crop(stop), handle.layer, handle.role)
        if isinstance(batch, slice) and batch == whole:
            return result
        if isinstance(batch, slice):
            part = batch.indices(result.shape[0])
            return make_handle(result.compact.select_range(part), handle.layer, handle.role)
        if isinstance(batch, (Tensor, list)):
            return _select(result, batch)
    raise CacheError(
        f"indexing a compressed KV cache with {index!r} is not supported: select samples (cache[indices]) or crop its "
        "length ([..., :n, :]); tgvkv_compile.inspect_cache shows what is kept"
    )


def _to(handle: LogicalKV, *args: Any, **kwargs: Any) -> LogicalKV:
    if kwargs.pop("copy", False):
        _clone(handle)
    kwargs.pop("memory_format", None)
    device, dtype, *_ = parse_to(*args, **kwargs)
    if device is not None and _indexed(device) != handle.device:
        raise CacheError(
            f"to({device}) on a compressed KV cache: it cannot be moved from {handle.device}; move the model and the inputs "
            "before the prefill, and turn cache offloading off"
        )
    if dtype is not None and dtype != handle.dtype:
        raise CacheError(f"to({dtype}) on a compressed KV cache of {handle.dtype}: it cannot change its dtype")
    return handle


def _indexed(device: torch.device) -> torch.device:
    """`device` as a tensor on it names it: `cuda` is the current `cuda:<n>`."""
    if device.type in ("cpu", "meta") or device.index is not None or not torch.accelerator.is_available():
        return device
    return torch.empty(0, device=device).device


def _cpu(handle: LogicalKV, **_: Any) -> LogicalKV:
    return _to(handle, torch.device("cpu"))


def _cuda(handle: LogicalKV, device: Any = None, *_: Any, **__: Any) -> LogicalKV:
    target = f"cuda:{device}" if isinstance(device, int) else device or "cuda"
    return _to(handle, torch.device(target))


def _same(handle: LogicalKV, *_: Any, **__: Any) -> LogicalKV:
    return handle


def _clone(handle: LogicalKV, **_: Any) -> LogicalKV:
    raise CacheError("clone() of one layer of a compressed KV cache: copy the whole cache with copy.deepcopy(cache)")


_HONOURED: dict[str, Callable[..., Any]] = {
    "index_select": _index_select,
    "repeat_interleave": _repeat_interleave,
    "__getitem__": _getitem,
    "to": _to,
    "cpu": _cpu,
    "cuda": _cuda,
    "contiguous": _same,
    "detach": _same,
    "requires_grad_": _same,
    "clone": _clone,
}
