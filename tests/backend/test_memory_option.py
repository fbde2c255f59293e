"""`memory=` in place of a budget."""

from typing import Any

import pytest
import torch

from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile import explain, inspect_cache, tgvkv_backend
from tgvkv_compile.config import EvictionConfig, parse_bytes
from tgvkv_compile.errors import ConfigError

SHAPE = Shape(layers=2, heads=2, kv_heads=2, head_dim=16)
TOKEN = {None: 2 * 2 * 2 * 16 * 4, "int8": 2 * 2 * 2 * (16 + 4), "int4": 2 * 2 * 2 * (8 + 4)}
"""Bytes of a token in both layers."""
WINDOW = 4 * TOKEN["int4"]
"""What two of the newest tokens take once more in int4: one for each 16 of 40."""


def held(**options: Any) -> Any:
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(lowering="eager", **options))
    with torch.no_grad():
        return inspect_cache(model(**make_inputs(((9, 20),)), use_cache=True))


@pytest.mark.parametrize("kv_dtype", TOKEN)
def test_it_is_the_tokens_that_fit(kv_dtype: Any) -> None:
    window = WINDOW if kv_dtype == "int4" else 0
    report = held(memory=40 * TOKEN[kv_dtype] + window + 5, kv_dtype=kv_dtype)
    same = held(budget=40, kv_dtype=kv_dtype)
    assert torch.equal(report.segment_lengths, same.segment_lengths)
    assert report.key_bytes + report.value_bytes + report.scale_bytes <= 40 * TOKEN[kv_dtype]


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2 KB", 2000), ("3B", 3)], ids=str
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes("memory", text) == size == EvictionConfig(memory=text).memory


@pytest.mark.parametrize("text", ["", "MiB", "64 MIB", "-3", 0, True, 1.5, "1e3"], ids=str)
def test_no_size(text: Any) -> None:
    with pytest.raises(ConfigError, match="memory="):
        EvictionConfig(memory=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1, "memory": 1000}, "budget=0.1 and memory=1000 were both given; give one of them"),
        ({"memory": 1000, "budget_of": "vision"}, "memory=1000 needs budget_of='all'"),
        ({"kv_dtype": "int3"}, "kv_dtype='int3' is not known; choose one of None, 'int8', 'int4', 'float8_e4m3fn'"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tgvkv_backend(**options)


def test_too_little_for_the_sinks() -> None:
    with pytest.raises(ConfigError, match=r"hold 4 tokens of this model \(512 bytes each, .*give at least 2560 bytes"):
        held(memory=4 * TOKEN[None])


def test_too_little_for_the_question() -> None:
    with pytest.raises(
        ConfigError, match="hold 10 tokens per layer, but the question of sample 0 and the first 4 tokens are 24"
    ):
        held(memory=10 * TOKEN[None])


def test_what_explain_says() -> None:
    text = str(explain(make_model(SHAPE), make_inputs(((9, 20),)), memory=40 * TOKEN["int8"], kv_dtype="int8"))
    assert f"memory={40 * TOKEN['int8']} bytes" in text and "kv_dtype=int8" in text
