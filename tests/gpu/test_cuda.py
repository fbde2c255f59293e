"""What only a CUDA device can show; `pytest -m gpu`. The kernels' own maths is tested everywhere, in `tests/kernels`."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.kernels.bounds import check_bounded
from tests.kernels.cases import StepCase, quantised, random_step
from tests.kernels.comparing import decided, plain, same_books
from tests.ops.prompts import Layer, make_layer
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import kept_of
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig, KVDtype
from tgvkv_compile.ops.attention.sdpa import kernel_with_lse, scaled_dot_product_attention_with_lse
from tgvkv_compile.ops.cache import decode_step as op
from tgvkv_compile.ops.state import CompactState
from tgvkv_compile.ops.token_types import TokenTypes

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = Shape(layers=2, seed=7)
STEPS = 6


def on_cuda(case: StepCase) -> tuple[list[Tensor], CompactState]:
    """The new token and a state of its own, on the device."""
    return [x.cuda() for x in (case.query, case.key, case.value)], CompactState(*(x.cuda() for x in case.state))


def step(new: list[Tensor], state: CompactState, case: StepCase, decode: str = "ratio") -> Tensor:
    return torch.ops.tgvkv.decode_step(*new, *state, case.layer, case.scale, decode, 4, case.kv_dtype)


@pytest.mark.parametrize("decode", ["ratio", "fixed", "keep"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 7), (128, 1), (128, 4), (256, 8)])
def test_a_step_is_the_plain_step(dim: int, group: int, dtype: torch.dtype, decode: str) -> None:
    case = random_step(batch=3, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=1500, seed=dim + group)
    new, state = on_cuda(case)
    output = step(new, state, case, decode)
    books = case.fresh()
    expected = op._decode_step(case.query, case.key, case.value, *books, case.layer, case.scale, decode, 4)
    exact, *_, largest = case.exact()
    check_bounded(output.cpu(), expected, exact, largest_logit=largest)
    for name, got, wanted in zip(CompactState._fields, state, books, strict=True):
        assert torch.equal(got.cpu(), wanted), name


@pytest.mark.parametrize("kv_dtype", get_args(KVDtype))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 7), (128, 1), (128, 4), (256, 8)])
def test_a_step_on_codes_is_the_plain_step(dim: int, group: int, dtype: torch.dtype, kv_dtype: KVDtype) -> None:
    whole = random_step(batch=3, kv_heads=2, group=group, dim=dim, dtype=dtype, longest=1500, seed=dim + group)
    case = quantised(whole, kv_dtype)
    new, state = on_cuda(case)
    output = step(new, state, case)
    expected, books = plain(case, "ratio")
    exact, *_, largest = case.exact()
    check_bounded(output.cpu(), expected, exact, largest_logit=largest)
    after = CompactState(*(x.cpu() for x in state))
    same_books(after if decided(case) else CompactState(*after[:2], *books[2:]), books, kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, *get_args(KVDtype)])
def test_a_step_is_replayed_while_segments_change(kv_dtype: KVDtype | None) -> None:
    """Captured once, right in every later step: nothing of it depends on what the host knows."""
    case = random_step(batch=2, kv_heads=2, group=4, dim=128, dtype=torch.bfloat16, longest=700)
    case = case if kv_dtype is None else quantised(case, kv_dtype)
    new, state = on_cuda(case)
    step(new, CompactState(*(x.clone() for x in state)), case)  # compiles the kernels
    books = case.fresh()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(new, state, case)
        state.lengths.add_(1)
    for _ in range(12):
        graph.replay()
        options = (case.layer, case.scale, "ratio", 4, kv_dtype)
        expected = op._decode_step(case.query, case.key, case.value, *books, *options)
        books.lengths.add_(1)
        torch.testing.assert_close(output.cpu(), expected, atol=2e-2, rtol=2e-2)
        same_books(CompactState(*(x.cpu() for x in state)), books, kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, *get_args(KVDtype)])
def test_a_step_does_not_wait_for_the_device(kv_dtype: KVDtype | None) -> None:
    case = random_step(batch=2, kv_heads=2, group=4, dim=128, dtype=torch.bfloat16)
    case = case if kv_dtype is None else quantised(case, kv_dtype)
    new, state = on_cuda(case)
    step(new, state, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(new, state, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_tells_its_log_sum_exp(mask: str, dtype: torch.dtype) -> None:
    layer = make_layer(heads=4, kv_heads=2, length=333, dim=64, dtype=dtype, mask=mask)
    q, k, v = layer.q.cuda(), layer.k.cuda(), torch.randn_like(layer.k).cuda()
    bias = None if layer.attn_mask is None else layer.attn_mask.cuda()
    assert kernel_with_lse(q, k, v, bias) is not None
    output, lse = scaled_dot_product_attention_with_lse(q, k, v, bias, layer.is_causal, layer.scale)
    assert lse is not None
    wide = [x.double().repeat_interleave(4 // x.shape[1], dim=1) for x in (q, k, v)]
    logits = wide[0] @ wide[1].transpose(2, 3) * layer.scale
    if layer.is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    if bias is not None:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias.double()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    real = layer.token_types.valid[:, None, :].cuda()  # a row of padding sees nothing
    for got, wanted in ((output, logits.softmax(-1) @ wide[2]), (lse[..., None], logits.logsumexp(-1, keepdim=True))):
        difference = (got.double() - wanted).abs().amax(-1)
        assert bool((difference <= tolerance * (1 + wanted.abs().amax(-1)))[real.expand_as(difference)].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_prefill_scores_are_those_of_the_cpu(mask: str, dtype: torch.dtype) -> None:
    layer = make_layer(heads=4, kv_heads=2, length=700, dim=128, dtype=dtype, mask=mask)
    q, k = layer.q.cuda(), layer.k.cuda()
    bias = None if layer.attn_mask is None else layer.attn_mask.cuda()
    _, lse = scaled_dot_product_attention_with_lse(q, k, k, bias, layer.is_causal, layer.scale)
    token_types = TokenTypes(*(part.cuda() for part in layer.token_types))
    moved = Layer(q, k, token_types, bias, layer.is_causal, layer.scale)
    for got, wanted in zip(moved.scores(lse), layer.scores(), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_generate_is_the_reference(options: dict[str, Any]) -> None:
    """Ragged batch, twice: a second request must find nothing of the first."""
    inputs = make_inputs(((5, 9), (3, 14)))
    expected = reference(make_model(SHAPE), inputs, STEPS, config=EvictionConfig(0.3), image_token=IMAGE)
    model = make_model(SHAPE).cuda()
    model.compile(backend=tgvkv_backend(0.3, growth_reserve=3, **options))
    moved = {name: value.cuda() for name, value in inputs.items()}
    for _ in range(2):
        output = model.generate(**moved, max_new_tokens=STEPS + 1, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :].cpu(), expected.continuation)
        assert kept_of(output.past_key_values) == expected.kept[-1]


def test_a_second_live_cache_leaves_the_first_alone() -> None:
    inputs = {name: value.cuda() for name, value in make_inputs(((5, 9),)).items()}
    model = make_model(SHAPE).cuda()
    model.compile(backend=tgvkv_backend(0.3, mode="reduce-overhead"))
    with torch.no_grad():
        first, second = (model(**inputs, use_cache=True) for _ in range(2))
        before = kept_of(first.past_key_values)
        token = second.logits[:, -1:].argmax(-1)
        for _ in range(4):
            model(input_ids=token, past_key_values=second.past_key_values, use_cache=True)
        assert kept_of(first.past_key_values) == before
