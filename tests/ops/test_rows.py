"""Rows of an arena: what is written comes back, whatever the head dim."""

from typing import Any, get_args

import pytest
import torch
from torch import library

from tests.support.quantising import as_held
from tgvkv_compile.config import KVDtype
from tgvkv_compile.ops.cache.rows import RowForm, from_rows, to_rows

DTYPES = get_args(KVDtype)


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_what_is_written_comes_back(kv_dtype: Any, dim: int, keys: bool) -> None:
    values = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(0))
    form = RowForm(kv_dtype, dim, torch.float32)
    rows = to_rows(values, kv_dtype, keys=keys)
    codes = dim // 2 if kv_dtype == "int4" else dim
    assert rows.dtype == form.dtype == torch.uint8 and rows.shape[-1] == form.size == form.bytes == codes + 4
    assert (form.code_bytes, form.scale_bytes) == (codes, 4)
    # A rotation in another order may round a number to the next code.
    torch.testing.assert_close(from_rows(rows, form, keys=keys), as_held(values, kv_dtype, keys=keys), atol=0.3, rtol=0)
    torch.testing.assert_close(from_rows(rows, form, keys=keys), values, atol=0.8 if kv_dtype == "int4" else 0.5, rtol=0)


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_the_op_passes_opcheck(kv_dtype: str) -> None:
    library.opcheck(torch.ops.tgvkv.to_rows, (torch.randn(2, 3, 5, 8), kv_dtype, True))


def test_rows_of_the_models_own_dtype_are_what_was_given() -> None:
    values = torch.randn(1, 2, 3, 8)
    assert to_rows(values, None, keys=True) is values
    assert from_rows(values, RowForm.of(values, None), keys=True) is values
