"""Sliding windows that are cut behind the graph, and who keeps transformers' own way."""

from typing import Any

import pytest
import torch
from transformers import Cohere2Config, Cohere2ForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tgvkv_compile import tgvkv_backend
from tgvkv_compile.backend.sliding_windows import lay_out, settle

WINDOW = 6


def text_model() -> Any:
    """A sliding and a full layer, and no vision: nothing is cut before its decoder."""
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=kinds,
        sliding_window=WINDOW,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
    )
    return Cohere2ForCausalLM(config).eval().requires_grad_(False)


def window_of(length: int, *, uncut: bool = False) -> tuple[DynamicCache, Any]:
    """A cache of one layer that has seen so many tokens; numbers count them."""
    layer = DynamicSlidingWindowLayer(sliding_window=WINDOW)
    count = torch.arange(float(length))[None, None, :, None].expand(2, 3, length, 4)
    layer.lazy_initialization(count, count)
    layer.keys = layer.values = count if uncut else count[:, :, -WINDOW + 1 :]
    layer.cumulative_length = length
    if uncut:
        layer._tgvkv_uncut = True
    cache = DynamicCache()
    cache.layers = [layer]
    return cache, layer


@pytest.mark.parametrize("length", [1, WINDOW - 2, WINDOW - 1, WINDOW, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_whoever_left_a_window_it_is_laid_out_alike(length: int, masked: bool) -> None:
    """A step that appends a token to it leaves the form that it found, as long as the window is as full as before."""
    cache, layer = window_of(length, uncut=True)
    settle(cache)
    lay_out(cache, masked=masked)
    kept = min(length, WINDOW - 1)
    assert layer.keys[0, 0, :, 0].tolist() == list(range(length - kept, length))
    full = layer.cumulative_length >= WINDOW - (not masked)
    before = layer.keys.stride()
    assert layer.keys.is_contiguous() is not full
    layer.keys = layer.values = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=2)
    layer.cumulative_length = int(layer.cumulative_length) + 1
    layer._tgvkv_uncut = True
    settle(cache)
    data = layer.keys.data_ptr()
    lay_out(cache, masked=masked)
    if full:
        assert layer.keys.stride() == before and layer.keys.data_ptr() == data  # no copy


def test_what_no_graph_has_handed_back_is_not_cut() -> None:
    cache, layer = window_of(20)
    settle(cache)
    assert layer.keys.shape[2] == WINDOW - 1
    settle(None)
    settle(object())


@pytest.mark.parametrize("ours", [False, True])
def test_models_without_a_cut_keep_their_windows(ours: bool) -> None:
    """Stock `torch.compile`, and this backend on a model of texts."""
    torch._dynamo.reset()
    model = text_model()
    prompt = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    options: Any = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(prompt, **options)
    backend = tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend if ours else "eager")
    found = model.generate(prompt, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    cache = found.get("cache", found.get("past_key_values"))
    assert cache.layers[0].keys.shape[2] == WINDOW - 1
    assert type(cache.layers[0].cumulative_length) is int
