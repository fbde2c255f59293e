import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.prompts import Layer, causal, make_layer, random_attention, vision_at, vision_masks
from tgvkv_compile.ops import weighing
from tgvkv_compile.ops.attention.probabilities import attention_probabilities
from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.rank import scores_from_attention
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.token_types import classify_tokens
from tgvkv_compile.ops.weighing import weigh

MASKS = ["none", "bool", "additive", "per-head", "prefix", "both"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "_BLOCK_BYTES", {"cpu": 1})  # so that every block has the least number of rows


def scores_by_loops(attention: Tensor, vision: Tensor) -> tuple[float, list[float]]:
    """The formulas as they are printed, in float64, for one causal `[N, N]`."""
    length = len(vision)
    rows = attention.tolist()
    v = [bool(entry) for entry in vision]
    last = max((i for i in range(length) if v[i]), default=-1)
    question = list(range(last + 1, length)) or [length - 1]
    mass = sum(rows[i][j] for i in question for j in range(length) if v[j])
    u = {j: sum(rows[i][j] for i in question if i >= j) / sum(i >= j for i in question) for j in question}
    score = [
        sum(u[j] * rows[j][t] for j in question) if v[t] else sum(rows[i][t] for i in range(t, length)) for t in range(length)
    ]
    return mass, score


@given(vision_masks(max_length=24), st.integers(0, 99))
@settings(max_examples=40)
def test_scores_are_the_printed_formulas(vision: Tensor, seed: int) -> None:
    attention = random_attention(1, len(vision), seed=seed)
    mass, score = scores_from_attention(attention, causal(len(vision))[None], classify_tokens(vision[None], None))
    expected_mass, expected_score = scores_by_loops(attention[0], vision)
    assert mass.dtype == score.dtype == torch.float32
    torch.testing.assert_close(mass, torch.tensor([expected_mass], dtype=torch.float32), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score, torch.tensor([expected_score], dtype=torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 2)])
def test_rows_and_columns_of_padding_do_not_count(left: int, right: int) -> None:
    vision, attention = vision_at(12, (3, 4)), random_attention(1, 12, seed=0)
    mass, score = scores_from_attention(attention, causal(12)[None], classify_tokens(vision[None], None))
    inner, length = slice(left, left + 12), left + 12 + right
    padded = torch.rand(1, length, length)
    padded[:, inner] = 0.0
    padded[:, inner, inner] = attention
    padded_vision = torch.zeros(1, length, dtype=torch.bool)
    padded_vision[:, inner] = vision
    token_types = classify_tokens(padded_vision, vision_at(length, (left, 12))[None])
    padded_mass, padded_score = scores_from_attention(padded, causal(length)[None], token_types)
    torch.testing.assert_close(padded_mass, mass)
    torch.testing.assert_close(padded_score[:, inner], score)
    assert int((padded_score != 0).sum()) <= 12


def test_bidirectional_prefix_counts_those_that_see() -> None:
    """In a fully visible 2-token question each token is seen by both."""
    attention = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]]])
    token_types = classify_tokens(torch.tensor([[True, False, False]]), None)
    mass, score = scores_from_attention(attention, torch.ones(1, 3, 3, dtype=torch.bool), token_types)
    u = [(0.2 + 0.5) / 2, (0.7 + 0.1) / 2]
    torch.testing.assert_close(mass, torch.tensor([0.5]))
    torch.testing.assert_close(score, torch.tensor([[u[0] * 0.1 + u[1] * 0.4, 1.0, 1.3]]))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_probabilities_are_those_of_repeated_keys(heads: int, kv_heads: int) -> None:
    layer = make_layer(batch=2, heads=heads, kv_heads=kv_heads, length=9)
    k = layer.k.repeat_interleave(heads // kv_heads, dim=1)
    logits = (layer.q @ k.transpose(2, 3) * layer.scale).masked_fill(~causal(9), float("-inf"))
    actual = attention_probabilities(layer.q, layer.k, causal(9)[None, None], layer.scale)
    torch.testing.assert_close(actual, logits.softmax(-1))


def test_a_row_that_sees_nothing_is_zero() -> None:
    layer = make_layer(length=6)
    visible = causal(6)[None, None].clone()
    visible[..., 2, :] = False
    actual = attention_probabilities(layer.q, layer.k, visible, layer.scale)
    assert bool((actual[:, :, 2] == 0).all())
    torch.testing.assert_close(actual.sum(-1)[:, :, 3:], torch.ones(1, 2, 3))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    batch = draw(st.integers(1, 3))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1), (4, 1)]))
    length = draw(st.integers(1, 70))
    spans = st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), max_size=3)
    vision = torch.stack([vision_at(length, *draw(spans)) for _ in range(batch)])
    padding = tuple(draw(st.integers(0, length - 1)) for _ in range(batch))
    return make_layer(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        vision=vision,
        padding=padding,
        mask=draw(st.sampled_from(MASKS)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 99)),
    )


def _check_op(layer: Layer) -> None:
    mass, score = layer.scores()
    expected_mass, expected_score = layer.materialised_scores()
    assert mass.dtype == score.dtype == torch.float32
    assert bool(score.isfinite().all())
    torch.testing.assert_close(mass, expected_mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score, expected_score, rtol=1e-5, atol=1e-6)
    assert bool((score[~layer.token_types.valid] == 0).all())


@given(layer=layers())
@settings(max_examples=100)
def test_op_by_small_blocks_is_the_materialised_maths(layer: Layer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighing, "_BLOCK_BYTES", {"cpu": 1})
        _check_op(layer)


@pytest.mark.parametrize("mask", MASKS)
def test_op_in_one_block_is_the_materialised_maths(mask: str) -> None:
    _check_op(make_layer(batch=2, heads=4, kv_heads=2, length=50, padding=(0, 11), mask=mask))


@given(layer=layers(), known=st.booleans(), wanted=st.sampled_from(["all", "vision", "text", "none"]))
@settings(max_examples=60)
def test_weighing_is_the_weighted_sum_of_materialised_rows(layer: Layer, known: bool, wanted: str) -> None:
    visible = layer.visible()
    k = layer.k.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], dim=1)
    logits = (layer.q.float() @ k.float().transpose(2, 3) * layer.scale).masked_fill(~visible, float("-inf"))
    attention = logits.softmax(-1).nan_to_num(nan=0.0).mean(1)
    token_types, weights = layer.token_types, layer.weights()
    columns = {
        "all": None,
        "vision": token_types.vision,
        "text": token_types.valid & ~token_types.vision,
        "none": torch.zeros_like(token_types.valid),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighing, "_BLOCK_BYTES", {"cpu": 1})
        found = weigh(weights, columns[wanted], layer.rows(logits.logsumexp(-1) if known else None))
    chosen = token_types.valid if columns[wanted] is None else columns[wanted]
    for got, rows in ((found.sums, attention), (found.seen, visible.any(1).expand_as(attention).float())):
        expected = torch.einsum("bkr,brs->bks", weights, rows) * chosen.unsqueeze(1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_question_longer_than_a_block() -> None:
    _check_op(make_layer(length=90, vision=vision_at(90, (3, 7))[None]))


@pytest.mark.parametrize("mask", ["none", "additive", "bool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(mask: str, dtype: torch.dtype) -> None:
    layer = make_layer(batch=2, heads=4, kv_heads=2, length=24, padding=(0, 3), mask=mask, dtype=dtype)
    for wanted in (None, layer.token_types.vision):
        library.opcheck(torch.ops.tgvkv.weigh.default, (layer.weights(), wanted, *layer.rows()))


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most elements of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_op_makes_no_square(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the question as long as the prompt, so that both passes walk everything."""
    limit = 1 << 20
    monkeypatch.setattr(weighing, "_BLOCK_BYTES", {"cpu": limit})
    length = 1024
    layer = make_layer(heads=4, kv_heads=2, length=length, vision=vision_at(length, (2, 9))[None], mask=mask)
    with _Largest() as op:
        layer.scores()
    assert 0 < op.elements <= limit / 4 < length * length


@pytest.mark.parametrize("shape", [(1, 8, 3000, 64), (1, 32, 16000, 128), (4, 16, 900, 64), (1, 1, 7, 8)])
def test_blocks_stay_within_their_bytes(shape: tuple[int, int, int, int]) -> None:
    rows = weighing.block_rows(torch.empty(1).expand(shape), shape[2])
    assert rows == 16 or 16 < rows <= (16 << 20) / (4 * shape[0] * shape[1] * shape[2])


def test_the_recorder_sees_a_square() -> None:
    layer = make_layer(heads=2, length=300)
    with _Largest() as materialised:
        layer.materialised_scores()
    assert materialised.elements >= 2 * 300 * 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selection_on_half_precision_inputs_is_that_of_exact_maths(dtype: torch.dtype) -> None:
    """Inputs are rounded, the maths is not: for every count the selection is that of float64 on the same values."""
    vision = vision_at(300, (5, 100))[None]
    layer = make_layer(heads=4, kv_heads=2, length=300, dim=16, vision=vision, dtype=dtype)
    _, score = layer.scores()
    k = layer.k.double().repeat_interleave(2, dim=1)
    logits = layer.q.double() @ k.transpose(2, 3) * layer.scale
    exact = logits.masked_fill(~causal(300), float("-inf")).softmax(-1).mean(1)
    _, exact_score = scores_from_attention(exact, causal(300)[None], layer.token_types)

    def wrong(candidate: Tensor) -> int:
        """For how many counts `candidate` selects otherwise than the exact score."""
        keeps = [
            [
                select_tokens(s, text_first(layer.token_types), layer.token_types, torch.tensor([count]), sink_tokens=4)
                for s in (candidate, exact_score)
            ]
            for count in range(5, 300)
        ]
        return sum(not torch.equal(actual, expected) for actual, expected in keeps)

    assert wrong(score) == 0
    assert wrong(score.to(dtype).float()) > 3, "this prompt cannot tell precisions apart"


def test_fake_result_has_the_shapes_of_the_real_one() -> None:
    layer = make_layer(batch=3, length=17, dtype=torch.bfloat16)
    args = (layer.weights(3), None, *layer.rows())
    real = torch.ops.tgvkv.weigh(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.tgvkv.weigh(*[mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args])
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_mass_is_the_number_of_question_tokens_at_most() -> None:
    layer = make_layer(length=40)
    mass, _ = layer.scores()
    assert 0 < float(mass) < int(layer.token_types.question.sum())
    assert math.isfinite(float(mass))
