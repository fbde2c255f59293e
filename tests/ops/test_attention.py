"""Which attention kernel is called for its log-sum-exp. CUDA is chosen for on fake tensors; no device is there."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tgvkv_compile.ops.attention import sdpa as attention
from tgvkv_compile.ops.attention.sdpa import aligned_bias, kernel_with_lse, scaled_dot_product_attention_with_lse

aten = torch.ops.aten


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ampere", lambda device: True)


def _qkv(dtype: torch.dtype, dim: int = 64, value_dim: int | None = None, device: str = "cuda") -> tuple[Tensor, ...]:
    q = torch.empty(2, 8, 50, dim, dtype=dtype, device=device)
    k = torch.empty(2, 2, 50, dim, dtype=dtype, device=device)
    return q, k, torch.empty(2, 2, 50, value_dim or dim, dtype=dtype, device=device)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "without_mask", "with_mask"),
    [
        (torch.bfloat16, 64, "flash", "efficient"),
        (torch.float16, 80, "flash", "efficient"),
        (torch.bfloat16, 256, "flash", "efficient"),
        (torch.bfloat16, 288, "efficient", "efficient"),
        (torch.float32, 128, "efficient", "efficient"),
        (torch.bfloat16, 60, None, None),  # would be padded first
        (torch.float64, 64, None, None),
    ],
)
def test_what_cuda_gets(dtype: torch.dtype, dim: int, without_mask: str | None, with_mask: str | None, masked: bool) -> None:
    with FakeTensorMode():
        q, k, v = _qkv(dtype, dim)
        mask = torch.empty(2, 1, 50, 50, dtype=torch.bool, device="cuda") if masked else None
        expected = with_mask if masked else without_mask
        assert kernel_with_lse(q, k, v, mask) == expected
        if expected is None:
            return
        output, lse = scaled_dot_product_attention_with_lse(q, k, v, mask, not masked, 0.1)
    assert output.shape == q.shape and output.dtype == dtype
    assert lse is not None and lse.shape == (2, 8, 50) and lse.dtype == torch.float32


@pytest.mark.usefixtures("ampere")
def test_values_of_another_width_have_no_kernel() -> None:
    with FakeTensorMode():
        assert kernel_with_lse(*_qkv(torch.bfloat16, 64, 32), None) is None
    assert kernel_with_lse(*_qkv(torch.bfloat16, 64, 32, "cpu"), None) is None


@pytest.mark.usefixtures("ampere")
def test_kernels_that_were_switched_off_are_not_called() -> None:
    with FakeTensorMode():
        q, k, v = _qkv(torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert kernel_with_lse(q, k, v, None) is None
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            assert kernel_with_lse(q, k, v, None) == "efficient"


def test_older_devices_have_no_flash_kernel_and_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ampere", lambda device: False)
    with FakeTensorMode():
        assert kernel_with_lse(*_qkv(torch.float16), None) == "efficient"
        assert kernel_with_lse(*_qkv(torch.bfloat16), None) is None


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("kernel", ["_flash_attention", "_efficient_attention"])
def test_the_schemas_are_those_the_calls_were_written_for(kernel: str) -> None:
    """Arguments by position and the first two results, torch 2.11 to 2.14."""
    schema = getattr(aten, f"_scaled_dot_product{kernel}").default._schema
    names = [argument.name for argument in schema.arguments]
    last = {"_flash_attention": ["dropout_p", "is_causal", "return_debug_mask", "scale"]}.get(
        kernel, ["attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"]
    )
    assert names == ["query", "key", "value", *last]
    assert [result.name for result in schema.returns][:2] in (["output", "logsumexp"], ["output", "log_sumexp"])


@pytest.mark.parametrize("columns", [16, 50, 51])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("additive", [False, True])
def test_the_bias_is_the_mask_and_its_rows_are_aligned(columns: int, heads: int, additive: bool) -> None:
    query = torch.empty(2, 8, 20, 64, dtype=torch.bfloat16)
    mask = torch.rand(1, heads, 20, columns) < 0.5
    given = torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min) if additive else mask
    bias = aligned_bias(given, query)
    assert bias.shape == (2, 8, 20, columns) and bias.dtype == torch.bfloat16
    assert bias.stride(3) == 1 and bias.stride(2) % 16 == 0
    assert bias.stride(0) == 0 and (heads == 8) == (bias.stride(1) != 0)
    torch.testing.assert_close(bias == 0, mask.expand(2, 8, -1, -1), rtol=0, atol=0)


def test_the_efficient_call_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, on the CPU, with the kernel replaced by the formula: lse rounded up to 32 rows as there."""
    q, k, v = (torch.randn(2, heads, 50, 16) for heads in (8, 2, 2))
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]

    def formula(query, key, value, bias, compute, dropout, is_causal, *, scale):  # type: ignore[no-untyped-def]
        assert compute and dropout == 0.0 and not is_causal
        logits = query @ key.transpose(2, 3) * scale + bias
        lse = torch.nn.functional.pad(logits.logsumexp(-1), (0, 14), value=float("nan"))
        return logits.softmax(-1) @ value, lse, None, None

    expected = scaled_dot_product_attention_with_lse(q, k, v, mask, False, 0.3)
    monkeypatch.setattr(attention, "kernel_with_lse", lambda *_: "efficient")
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", formula)
    torch.testing.assert_close(scaled_dot_product_attention_with_lse(q, k, v, mask, False, 0.3), expected)
