"""Caches in int8, int4 and float8, in compiled models: against a reference that quantises number by number."""

from typing import Any, get_args

import pytest

from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.config import EvictionConfig, KVDtype

SHAPE = Shape(layers=3, seed=3)
PADDED = ((5, 9), (3, 2, 12))
DTYPES = get_args(KVDtype)


def compiled(**options: Any) -> Any:
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(**{"budget": 0.4, "lowering": "eager", **options}))
    return model


@pytest.mark.parametrize("prompts", [((5, 9),), PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_it_is_the_reference(kv_dtype: Any, prompts: Any) -> None:
    inputs = make_inputs(prompts)
    config = EvictionConfig(0.4, kv_dtype=kv_dtype)
    expected = reference(make_model(SHAPE), inputs, 6, config=config, image_token=IMAGE)
    assert_same_run(run(compiled(kv_dtype=kv_dtype), inputs, 6), expected)
