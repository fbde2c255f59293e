"""Memory is really saved: counted over live storages, and over what the prefill makes on its way."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden.recorded import load_inputs, load_model
from tests.support.memory import Watch, full_bytes, total_live
from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import inspect_cache, tgvkv_backend
from tgvkv_compile.backend import programs
from tgvkv_compile.fx.meta import fake_value
from tgvkv_compile.fx.targets import op_kind
from tgvkv_compile.ops import weighing

SMALL = 1024
"""Storages below this are bookkeeping: lengths and starts of segments, the handles' scalars."""


@pytest.fixture(scope="module")
def llava_576() -> Iterator[Any]:
    yield load_model("llava-576")


@torch.no_grad()
def prefill(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


def batch_of_two(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt, and the prompt without its last nine tokens, padded."""
    ids = inputs["input_ids"]
    short = torch.cat([torch.zeros(1, 9, dtype=ids.dtype), ids[:, :-9]], dim=1)
    mask = torch.ones(2, ids.shape[1], dtype=ids.dtype)
    mask[1, :9] = 0
    return {
        "input_ids": torch.cat([ids, short]),
        "attention_mask": mask,
        "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1),
    }


@pytest.mark.parametrize(
    ("budget", "most", "batch", "lowering"),
    [
        (0.05, 0.1, 1, "eager"),
        (0.2, 0.25, 1, "eager"),
        (0.05, 0.1, 2, "eager"),
        (0.2, 0.25, 2, "eager"),
        pytest.param(0.05, 0.1, 2, "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_cache_holds_the_budget(llava_576: Any, budget: float, most: float, batch: int, lowering: Any) -> None:
    model, inputs = llava_576, load_inputs("llava-576")
    if batch == 2:
        inputs = batch_of_two(inputs)
    model.compile(backend=tgvkv_backend(budget, lowering=lowering, growth_reserve=32))
    prefill(model, inputs)  # compiles
    full = full_bytes(model, inputs["input_ids"].shape[1], batch)
    watch = Watch()
    cache = prefill(model, inputs)
    held = watch.bytes()
    report = inspect_cache(cache)
    assert report.logical_bytes == full
    assert held <= 1.05 * budget * full + report.reserve_bytes + SMALL
    assert held <= most * full, "the reserve itself is out of proportion"
    # Keys, values and slot positions are what the report says; all else is small: a byte per token tells vision from text.
    history = 1.01 * inputs["input_ids"].numel()  # rows may be aligned
    assert report.physical_bytes <= watch.bytes(at_least=SMALL) <= report.physical_bytes + history
    assert held - report.physical_bytes <= SMALL + history
    del report, cache
    assert watch.bytes() == 0


def test_an_uncompressed_cache_is_counted_whole(llava_576: Any) -> None:
    """The way of counting sees the full cache of the stock model."""
    stock, inputs = load_model("llava-576"), load_inputs("llava-576")
    watch = Watch()
    cache = prefill(stock, inputs)
    full = full_bytes(stock, inputs["input_ids"].shape[1])
    assert full <= watch.bytes() <= 1.01 * full
    assert inspect_cache(cache).physical_bytes == full


def test_growth_is_geometric_and_reported() -> None:
    """Past the reserve the arena grows; the old one goes."""
    model, inputs = make_model(Shape(layers=4, side=8)), make_inputs(((5, 20),), side=8)
    model.compile(backend=tgvkv_backend(0.1, lowering="eager", decode="keep", growth_reserve=4))
    run(model, inputs, 30)
    watch = Watch()
    sizes: list[int] = []

    def check(cache: Any) -> None:
        report = inspect_cache(cache)
        sizes.append(report.physical_bytes)
        if len(sizes) % 5 == 0:  # not at the first call, whose own output is still held
            held = watch.bytes(at_least=SMALL)
            assert 0.9 * report.physical_bytes <= held <= 1.1 * report.physical_bytes

    trace = run(model, inputs, 30, on_step=check)
    grown = sorted(set(sizes))
    assert 2 <= len(grown) <= 5
    assert sizes == sorted(sizes)
    del trace
    assert watch.bytes(at_least=SMALL) == 0


def test_requests_in_sequence_do_not_add_up() -> None:
    model, inputs = make_model(Shape(layers=3)), make_inputs(((5, 9), (3, 2, 6)))
    model.compile(backend=tgvkv_backend(0.3, lowering="eager", growth_reserve=4))
    totals = []
    for _ in range(11):
        model.generate(**inputs, max_new_tokens=10, do_sample=False)
        totals.append(total_live())
    assert totals[1:] == totals[1:2] * 10


class Largest(TorchDispatchMode):
    """Records floats whose two last dimensions are both at least `length`.

    Operators of ours are opaque to a mode; it goes into the scoring op by calling its body.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.operators.add(name)
        if name == "tgvkv.weigh.default":
            with self:
                result = weighing.plain_weigh(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                if min(tensor.shape[-2:]) >= self.length:
                    self.found.append((name, tuple(tensor.shape)))
        return result


Mode = TypeVar("Mode", bound=TorchDispatchMode)

# So many heads and tokens that a block of attention rows (16 MiB) is shorter than the prompt.
LONG = Shape(layers=2, heads=16, kv_heads=4, head_dim=4, side=26)


def long_prompt(batch: int) -> dict[str, Tensor]:
    return make_inputs(((6, 20), (4, 13))[:batch], side=LONG.side)


def watch_graphs(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Mode]) -> tuple[list[Mode], list[GraphModule]]:
    """Has every rewritten graph run under a mode of its own; gives these and the graphs."""
    modes: list[Mode] = []
    graphs: list[GraphModule] = []
    lower = programs.lower_rewritten

    def lower_and_watch(gm: GraphModule, environment: Any, **options: Any) -> Any:
        graphs.append(gm)
        lowered = lower(gm, environment, **options)
        inner = lowered._run

        def watched(*inputs: Any) -> Any:
            mode = make()
            modes.append(mode)
            with mode:
                return inner(*inputs)

        lowered._run = watched
        return lowered

    monkeypatch.setattr(programs, "lower_rewritten", lower_and_watch)
    return modes, graphs


# What a mask of one head is turned from bool to float by, or picked apart with. Attention is made by none of these.
MASKING = {"zeros_like", "masked_fill", "where", "alias", "select", "expand", "slice", "_to_copy", "unsqueeze", "clone"}


def hands_masks(gm: GraphModule) -> bool:
    """Whether attention is given a mask: older releases make one of one head where nothing is padded, too."""
    calls = [node for node in gm.graph.nodes if getattr(node.target, "__name__", "").startswith("scaled_dot_product_attention")]
    return any(node.args[3] is not None for node in calls)


@pytest.mark.parametrize(
    ("attention", "lowering", "masked"),
    [
        ("sdpa", "eager", "no-mask"),
        ("sdpa", "eager", "padded"),
        ("eager", "eager", "mask"),
        ("sdpa", "aot_eager", "padded"),
        ("eager", "aot_eager", "no-mask"),
    ],
)
def test_the_prefill_never_holds_attention(monkeypatch: pytest.MonkeyPatch, attention: str, lowering: Any, masked: str) -> None:
    batch = 2 if masked == "padded" else 1
    inputs = long_prompt(batch)
    length = inputs["input_ids"].shape[1]
    if masked == "no-mask":
        del inputs["attention_mask"]
    modes, graphs = watch_graphs(monkeypatch, lambda: Largest(length))
    model = make_model(dataclasses.replace(LONG, attention=attention))
    model.compile(backend=tgvkv_backend(0.1, lowering=lowering))
    prefill(model, inputs)
    (mode,) = modes
    assert "tgvkv.weigh.default" in mode.operators
    if masked == "no-mask" and attention == "sdpa" and not hands_masks(graphs[0]):
        assert not mode.found
    for operator, shape in mode.found:
        one_head = shape in ((batch, 1, length, length), (batch, length, length), (1, 1, length, length))
        assert one_head and operator.split(".")[1] in MASKING, (operator, shape)


class LongKV(TorchDispatchMode):
    """Counts the storages that live at once and held keys or values of the whole prompt when they were made."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.most = shape, 0
        self._live: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tuple(tensor.shape) == self.shape:
                self._live[id(tensor)] = weakref.ref(tensor)
        self._live = {key: tensor for key, tensor in self._live.items() if tensor() is not None}
        self.most = max(self.most, len({tensor().untyped_storage().data_ptr() for tensor in self._live.values()}))
        return result


def most_long_kv(monkeypatch: pytest.MonkeyPatch, cap: float | None, layers: int) -> int:
    """How many keys and values of the whole prompt live at once in a prefill."""
    shape, inputs = Shape(layers=layers, heads=4, kv_heads=2, side=11), make_inputs(((6, 20),), side=11)
    length = inputs["input_ids"].shape[1]
    model = make_model(shape)
    model.compile(backend=tgvkv_backend(0.1, lowering="eager", prefill_cap=cap))
    with monkeypatch.context() as patch:
        modes, _ = watch_graphs(patch, lambda: LongKV((1, 2, length, shape.head_dim)))
        prefill(model, inputs)
    (mode,) = modes
    return mode.most


def test_a_capped_prefill_never_holds_the_kv_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (most_long_kv(monkeypatch, 2.0, layers) for layers in (4, 8))
    assert few == many, "it grows with the number of layers"
    assert most_long_kv(monkeypatch, None, 8) >= 16 > many


def test_attention_would_be_seen() -> None:
    """The stock model with attention written out holds it, and `Largest` says so."""
    inputs = long_prompt(1)
    length = inputs["input_ids"].shape[1]
    model = make_model(dataclasses.replace(LONG, attention="eager"))
    with torch.no_grad(), Largest(length) as mode:
        model(**inputs)
    assert (1, LONG.heads, length, length) in {shape for _, shape in mode.found}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_rewritten_graph(monkeypatch: pytest.MonkeyPatch, attention: str, batch: int) -> None:
    """One fused attention per layer is left, none written out, and no value of the graph is `[H, N, N]`."""
    shape = Shape(layers=3, heads=6, kv_heads=2, side=11, attention=attention)
    inputs = make_inputs(((6, 20), (4, 13))[:batch], side=11)
    length = inputs["input_ids"].shape[1]  # more than there are hidden sizes
    _, graphs = watch_graphs(monkeypatch, lambda: Largest(length))
    model = make_model(shape)
    model.compile(backend=tgvkv_backend(0.1, lowering="eager"))
    # The vision tower outside, as newer `generate` has it: what is left in the graph is the decoder.
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        monkeypatch.setattr(model.model, "get_image_features", lambda **_: features)
        model(**inputs, use_cache=True)
    (gm,) = graphs
    assert all(op_kind(node) != "softmax" for node in gm.graph.nodes)
    targets = [getattr(node.target, "__name__", "") for node in gm.graph.nodes]
    assert sum(name.startswith("scaled_dot_product_attention") for name in targets) == shape.layers
    assert targets.count("rank_tokens") == shape.layers
    wide = []
    for node in gm.graph.nodes:
        value = fake_value(node)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            if all(int(size) >= length for size in value.shape[-2:]):
                wide.append((node.name, tuple(value.shape)))
    masks = [name for name, size in wide if len(size) == 4 and size[1] == 1]
    assert len(wide) == len(masks), wide
    assert attention == "eager" or not masks
