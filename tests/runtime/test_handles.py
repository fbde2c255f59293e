"""What a handle answers, what it honours, and that nothing else gets a number out of it."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import CacheError
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.runtime.compact import CacheIdentity, CompactCache, kept_positions
from tgvkv_compile.runtime.logical import LogicalKV, make_handle

LENGTH, KEPT, SLOTS = 20, 6, 32


def make_cache(batch: int = 3) -> CompactCache:
    """Two layers of six entries each; sample `s` holds positions `s, s + 3, ...`."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([[0, 16]]).repeat(batch, 1)
    position = torch.full((batch, SLOTS), -1, dtype=torch.int32)
    for sample in range(batch):
        for first in (0, 16):
            position[sample, first : first + KEPT] = torch.arange(KEPT, dtype=torch.int32) * 3 + sample
    state = CompactState(
        torch.randn(batch, 2, SLOTS, 4, generator=generator),
        torch.randn(batch, 2, SLOTS, 4, generator=generator),
        position,
        start,
        torch.full((batch, 2), KEPT),
        start + KEPT,
        torch.full((batch, 2), 10),
        torch.full((batch, 2), 0.3),
        torch.full((batch,), LENGTH),
    )
    identity = CacheIdentity(1, 2, 2)
    return in_cache(state, identity, LENGTH)


def in_cache(state: CompactState, identity: CacheIdentity, length: int) -> CompactCache:
    history = torch.zeros(state.lengths.shape[0], length, dtype=torch.bool)
    return CompactCache(
        state, config=EvictionConfig(), identity=identity, history=history, logical_length=length, reserve=4, room=4
    )


@pytest.fixture
def handle() -> LogicalKV:
    return make_handle(make_cache(), 1, "key")


def positions(handle: LogicalKV) -> list[list[int]]:
    state = handle.compact.state
    return [kept_positions(state, handle.layer, sample).tolist() for sample in range(handle.compact.batch)]


def test_queries(handle: LogicalKV) -> None:
    assert handle.shape == handle.size() == (3, 2, LENGTH, 4)
    assert (handle.ndim, handle.dim(), handle.size(-2), len(handle)) == (4, 4, LENGTH, 3)
    assert handle.numel() == 3 * 2 * LENGTH * 4
    assert handle.dtype == torch.float32 and handle.is_floating_point()
    assert handle.device == torch.device("cpu") and handle.get_device() == -1
    assert not handle.requires_grad and not handle.is_cuda and handle.layout == torch.strided
    assert isinstance(handle, Tensor) and hash(handle) == hash(handle)


def test_it_takes_a_few_bytes(handle: LogicalKV) -> None:
    assert handle.untyped_storage().nbytes() == 4


def test_text(handle: LogicalKV) -> None:
    for text in (repr(handle), str(handle), f"{handle}"):
        assert text == "LogicalKV(key of layer 1, shape=(3, 2, 20, 4), dtype=torch.float32, device=cpu)"


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "cat": lambda h: torch.cat([h, torch.zeros(3, 2, 1, 4)], dim=-2),
    "cat-second": lambda h: torch.cat([torch.zeros(3, 2, 1, 4), h], dim=-2),
    "stack": lambda h: torch.stack([h, h]),
    "add": lambda h: h + 1,
    "radd": lambda h: 1 + h,
    "add-out": lambda h: torch.add(torch.zeros(1), h, out=torch.zeros(3, 2, LENGTH, 4)),
    "iadd": lambda h: h.add_(1),
    "copy-from": lambda h: torch.zeros(3, 2, LENGTH, 4).copy_(h),
    "assign-from": lambda h: torch.zeros(3, 2, LENGTH, 4).__setitem__(slice(None), h),
    "assign-to": lambda h: h.__setitem__(0, 1.0),
    "matmul": lambda h: torch.matmul(h, h.transpose(2, 3)),
    "matmul-other": lambda h: torch.ones(4, 4) @ h,
    "compare": lambda h: h == h,
    "isnan": lambda h: h.isnan(),
    "sum": lambda h: h.sum(),
    "sdpa": lambda h: torch.nn.functional.scaled_dot_product_attention(torch.ones(3, 2, 1, 4), h, h),
    "numpy": lambda h: h.numpy(),
    "array": lambda h: np.asarray(h),
    "array-of": lambda h: np.array([h]),
    "tolist": lambda h: h.tolist(),
    "iterate": lambda h: list(h),
    "data": lambda h: h.data,
    "detach-data": lambda h: h.detach().data,
    "float-method": lambda h: h.float(),
    "half": lambda h: h.half(),
    "double": lambda h: h.double(),
    "type": lambda h: h.type(torch.float64),
    "view": lambda h: h.view(-1),
    "reshape": lambda h: h.reshape(-1),
    "transpose": lambda h: h.transpose(1, 2),
    "mT": lambda h: h.mT,
    "as-tensor": lambda h: h.as_subclass(Tensor),
    "clone": lambda h: h.clone(),
    "to-copy": lambda h: h.to(torch.float32, copy=True),
    "dlpack": lambda h: h.__dlpack__(),
    "from-dlpack": lambda h: torch.from_dlpack(h),
    "unsqueeze": lambda h: h[:, :, None],
    "element": lambda h: h[0, 0, 0, 0],
    "head": lambda h: h[:, 0],
    "tail": lambda h: h[:, :, -3:],
    "strided": lambda h: h[:, :, ::2],
    "expand": lambda h: h.expand(2, 3, 2, LENGTH, 4),
    "storage": lambda h: h.storage(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_comes_out(handle: LogicalKV, name: str) -> None:
    with pytest.raises(CacheError) as caught:
        NUMBERS[name](handle)
    assert "compressed" in str(caught.value)


@pytest.mark.parametrize(
    ("operation", "name"),
    [("cat", "cat()"), ("matmul", "transpose()"), ("add", "add()"), ("numpy", "numpy()"), ("tolist", "tolist()")],
)
def test_the_error_names_the_operation(handle: LogicalKV, operation: str, name: str) -> None:
    with pytest.raises(CacheError) as caught:
        NUMBERS[operation](handle)
    assert str(caught.value).startswith(name) and "inspect_cache(...)" in str(caught.value)


SCALARS: dict[str, Callable[[Any], Any]] = {
    "bool()": bool,
    "float()": float,
    "int()": int,
    "item": lambda h: h.item(),
    "numpy": lambda h: h.numpy(),
    "array": lambda h: np.asarray(h),
    "index": lambda h: [1, 2][h],
    "complex()": complex,
    "format": lambda h: f"{h:.3f}",
}


@pytest.mark.parametrize("name", SCALARS)
def test_no_scalar_comes_out_of_one_element(name: str) -> None:
    """A handle of a single element is what `.item()` and `float()` would accept."""
    state = make_cache(1).state
    narrow = state._replace(key_arena=state.key_arena[:, :1, :, :1], value_arena=state.value_arena[:, :1, :, :1])
    cache = in_cache(narrow, CacheIdentity(1, 2, 2), 1)
    one = make_handle(cache, 0, "value")
    assert one.numel() == 1
    with pytest.raises(CacheError):
        SCALARS[name](one)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_torch_tensor_gives_nothing_but_nan(handle: LogicalKV) -> None:
    """`torch.tensor` copies without asking `__torch_function__`; it cannot be mistaken for data."""
    assert bool(torch.tensor(handle).isnan().all())


@pytest.mark.parametrize(
    "save", [pickle.dumps, lambda h: torch.save(h, io.BytesIO()), lambda h: torch.save({"cache": [h]}, io.BytesIO())]
)
def test_it_is_not_saved(handle: LogicalKV, save: Callable[[Any], Any]) -> None:
    with pytest.raises(CacheError, match="cannot be pickled"):
        save(handle)


@pytest.mark.parametrize("move", [
    lambda h: h.to("meta"), lambda h: h.to(device="meta"), lambda h: h.cuda(), lambda h: h.cuda(1), lambda h: h.to("cuda:1"),
    lambda h: h.to(torch.empty(0, device="meta")),
    lambda h: h.to("meta", non_blocking=True),
])  # fmt: skip
def test_it_is_not_moved(handle: LogicalKV, move: Callable[[Any], Any]) -> None:
    with pytest.raises(CacheError, match=r"to\((meta|cuda|cuda:1)\).*cannot be moved from cpu; move the model"):
        move(handle)


def test_it_changes_no_dtype(handle: LogicalKV) -> None:
    with pytest.raises(CacheError, match=r"to\(torch.float16\).*cannot change its dtype"):
        handle.to(torch.float16)


def test_staying_is_fine(handle: LogicalKV) -> None:
    for same in (
        handle.to("cpu"),
        handle.to(torch.float32),
        handle.to("cpu", torch.float32, non_blocking=True),
        handle.cpu(),
        handle.contiguous(),
        handle.detach(),
        handle.to(torch.zeros(1)),
    ):
        assert same is handle


INDICES: dict[str, Callable[[Any], Any]] = {
    "index_select": lambda h: h.index_select(0, torch.tensor([2, 0])),
    "tensor": lambda h: h[torch.tensor([2, 0])],
    "tensor-ellipsis": lambda h: h[torch.tensor([2, 0]), ...],
    "list": lambda h: h[[2, 0]],
    "list-ellipsis": lambda h: h[[2, 0], ...],
    "slice": lambda h: h[::2],
    "mask": lambda h: h[torch.tensor([True, False, True]), ...],
}


@pytest.mark.parametrize("name", INDICES)
def test_samples_are_selected(handle: LogicalKV, name: str) -> None:
    result = INDICES[name](handle)
    order = [0, 2] if name in ("slice", "mask") else [2, 0]
    assert isinstance(result, LogicalKV) and result.shape == (2, 2, LENGTH, 4)
    assert (result.layer, result.role) == (1, "key")
    assert positions(result) == [positions(handle)[sample] for sample in order]
    old, new = handle.compact.state, result.compact.state
    assert all(torch.equal(a[order], b) for a, b in zip(old, new, strict=True))
    assert positions(handle)[0] == [0, 3, 6, 9, 12, 15]  # the old one is as it was


@pytest.mark.parametrize("name", INDICES)
def test_one_new_cache_for_all_layers(name: str) -> None:
    """`DynamicCache` asks layer by layer; lists and masks become new tensors each time."""
    cache = make_cache()
    every = [make_handle(cache, layer, role) for layer in range(2) for role in ("key", "value")]
    results = [INDICES[name](handle) for handle in every]
    assert len({id(result.compact) for result in results}) == 1
    assert [(r.layer, r.role) for r in results] == [(h.layer, h.role) for h in every]


def test_another_selection_is_another_cache(handle: LogicalKV) -> None:
    one, other = handle[[0, 1]], handle[[1, 0]]
    assert one.compact is not other.compact and positions(one) != positions(other)
    indices = torch.tensor([0, 1])
    first = handle.index_select(0, indices)
    indices.copy_(torch.tensor([2, 1]))
    assert positions(handle.index_select(0, indices))[0] == positions(handle)[2] != positions(first)[0]


def test_repeating_samples(handle: LogicalKV) -> None:
    result = handle.repeat_interleave(2, dim=0)
    assert result.shape == (6, 2, LENGTH, 4)
    assert positions(result) == [row for row in positions(handle) for _ in range(2)]
    assert handle.repeat_interleave(2, dim=-4).compact is result.compact


def test_cropping(handle: LogicalKV) -> None:
    for result in (handle[..., :7, :], handle[:, :, :7], handle[..., :-13, :]):
        assert result.shape == (3, 2, 7, 4)
        assert positions(result) == [[0, 3, 6], [1, 4], [2, 5]]
    assert positions(handle)[0] == [0, 3, 6, 9, 12, 15]
    assert positions(handle[[1], :, :7]) == [[1, 4]]
    assert handle[..., :LENGTH, :] is handle and handle[:] is handle
    state = handle[..., :7, :].compact.state
    assert state.lengths.tolist() == [7, 7, 7] and state.segment_len.tolist() == [[3, 3], [2, 2], [2, 2]]


def test_a_crop_moves_keys_and_values_along(handle: LogicalKV) -> None:
    old, new = handle.compact.state, handle[..., :7, :].compact.state
    for sample in range(3):
        for layer in range(2):
            a, b = int(old.segment_start[sample, layer]), int(new.segment_start[sample, layer])
            count = int(new.segment_len[sample, layer])
            assert count >= 2
            for arena in ("key_arena", "value_arena"):
                before, after = getattr(old, arena)[sample], getattr(new, arena)[sample]
                assert torch.equal(before[:, a : a + count], after[:, b : b + count])


@pytest.mark.parametrize("wrong", [
    lambda h: h.index_select(2, torch.tensor([0])),
    lambda h: h.repeat_interleave(2, dim=1),
    lambda h: h.repeat_interleave(torch.tensor([1, 2, 1]), dim=0),
    lambda h: h[0],
    lambda h: h[:, [0]],
])  # fmt: skip
def test_other_selections_are_refused(handle: LogicalKV, wrong: Callable[[Any], Any]) -> None:
    with pytest.raises(CacheError, match="compressed KV cache"):
        wrong(handle)


def test_deepcopy_is_independent_and_shared_by_all_layers() -> None:
    cache = make_cache()
    every = [make_handle(cache, layer, role) for layer in range(2) for role in ("key", "value")]
    copies = copy.deepcopy({"cache": every})["cache"]
    assert len({id(twin.compact) for twin in copies}) == 1 and copies[0].compact is not cache
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(
        cache.state, copies[0].compact.state, strict=True
    ))  # fmt: skip
    copies[0].compact.state.key_arena.zero_()
    assert bool(cache.state.key_arena.any())


def test_a_broken_cache_is_neither_copied_nor_selected(handle: LogicalKV) -> None:
    handle.compact.broken = "a decode step failed half-way"
    for use in (copy.deepcopy, INDICES["list"], lambda h: h[..., :7, :], lambda h: h.repeat_interleave(2, dim=0)):
        with pytest.raises(CacheError, match="a decode step failed half-way; start the request again"):
            use(handle)


def test_the_arena_goes_with_the_last_handle() -> None:
    cache = make_cache()
    arena, whole = weakref.ref(cache.state.key_arena), weakref.ref(cache)
    one, other = make_handle(cache, 0, "key"), make_handle(cache, 1, "value")
    del cache, one
    gc.collect()
    assert arena() is not None
    assert other.compact is whole()
    del other
    gc.collect()
    assert arena() is None and whole() is None


def test_a_selection_keeps_no_old_arena_alive() -> None:
    handle = make_handle(make_cache(), 0, "key")
    arena = weakref.ref(handle.compact.state.key_arena)
    selected = handle[[1]]
    del handle
    gc.collect()
    assert arena() is None and positions(selected) == [[1, 4, 7, 10, 13, 16]]
