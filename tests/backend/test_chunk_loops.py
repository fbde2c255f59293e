"""The loop over chunks of a linear attention as one operation."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, library

from tgvkv_compile.backend.chunk_loops import keep_chunk_loops

qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
if not hasattr(qwen3_5, "torch_chunk_gated_delta_rule"):
    pytest.skip("the installed transformers has no such function", allow_module_level=True)


def arguments(length: int, *, batch: int = 2) -> list[Tensor]:
    """Query, key, value, decay and learning rate: two heads of keys, four of values."""
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(batch, length, 2, 8, generator=generator) for _ in range(2))
    value = torch.randn(batch, length, 4, 6, generator=generator)
    decay = -torch.rand(batch, length, 4, generator=generator)
    return [query, key, value, decay, torch.rand(batch, length, 4, generator=generator)]


def own() -> Any:
    keep_chunk_loops()
    return qwen3_5.torch_chunk_gated_delta_rule._tgvkv_own


@pytest.mark.parametrize("length", [5, 64, 130])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_operation_is_the_models_function(length: int, resumed: bool) -> None:
    given = arguments(length)
    state = torch.randn(2, 4, 8, 6) if resumed else None
    wanted = own()(*given, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    found = torch.ops.tgvkv.gated_delta_rule(*given, state, 64, True, qwen3_5.__name__)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    library.opcheck(
        torch.ops.tgvkv.gated_delta_rule,
        (*given, state, 64, True, qwen3_5.__name__),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_eager_and_stock_compiled_code_call_the_models_function(monkeypatch: pytest.MonkeyPatch) -> None:
    own()
    calls: list[str] = []
    monkeypatch.setattr(torch.ops.tgvkv, "gated_delta_rule", lambda *_: calls.append("operation"))
    given = arguments(9)
    ours = sys.modules[qwen3_5.__name__].torch_chunk_gated_delta_rule  # type: ignore[attr-defined]
    options: Any = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with torch.no_grad():
        eager = ours(*given, **options)
        stock = torch.compile(lambda: ours(*given, **options), backend="eager", fullgraph=True)()
    assert not calls and all(torch.allclose(one, other, atol=1e-5) for one, other in zip(stock, eager, strict=True))
