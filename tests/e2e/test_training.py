"""Training on a model that was compiled with the backend: nothing is evicted, and gradients are those of the stock model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from tests.backend.tiny import LENGTH, prefill, prompt, step, text_prompt, tiny_llava
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import CacheError, GradientsRequiredError, SplitDecoderError, UnsupportedGraphError
from tgvkv_compile.runtime.logical import LogicalKV

LOWERINGS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
DROPPED = "gradient checkpointing in training mode runs without a KV cache"


def trained(model: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch of two and the gradients of all weights."""
    inputs = prompt(2)
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], **options).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def in_training(*, checkpointed: bool, reentrant: bool = False, attention: str = "sdpa") -> Any:
    model = tiny_llava(attention=attention).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def compiled(model: Any, lowering: str = "eager") -> tuple[Any, Any]:
    """A compiled copy and its backend."""
    twin, backend = copy.deepcopy(model), tgvkv_backend(0.3, lowering=lowering)  # type: ignore[arg-type]
    twin.compile(backend=backend)
    return twin, backend


def assert_trains_as_stock(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 20
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("checkpointed", ["no", "reentrant", "not reentrant"])
def test_gradients_without_a_cache_are_those_of_the_stock_model(checkpointed: str, lowering: str) -> None:
    stock = in_training(checkpointed=checkpointed != "no", reentrant=checkpointed == "reentrant")
    model, backend = compiled(stock, lowering)
    assert_trains_as_stock(trained(model, use_cache=False), trained(stock, use_cache=False))
    assert backend.graphs == {"dense": 1}


def test_eager_attention_in_checkpointed_layers() -> None:
    stock = in_training(checkpointed=True, attention="eager")
    model, backend = compiled(stock, "aot_eager")
    assert_trains_as_stock(trained(model, use_cache=False), trained(stock, use_cache=False))
    assert backend.graphs == {"dense": 1}


@torch.no_grad()
def test_flex_attention_without_a_cache_runs_dense() -> None:
    stock = tiny_llava(attention="flex_attention")
    model, backend = compiled(stock)
    torch.testing.assert_close(model(**prompt(), use_cache=False).logits, stock(**prompt(), use_cache=False).logits)
    assert backend.graphs == {"dense": 1}


@pytest.mark.parametrize("use_cache", [True, None])
def test_checkpointing_switches_the_cache_off_and_says_so(use_cache: bool | None) -> None:
    stock = in_training(checkpointed=True)
    model, backend = compiled(stock)
    with pytest.warns(UserWarning, match=DROPPED):
        found = trained(model, use_cache=use_cache)
    assert_trains_as_stock(found, trained(stock, use_cache=False))
    assert backend.graphs == {"dense": 1}
    with pytest.warns(UserWarning, match=DROPPED):
        assert model(**prompt(), use_cache=use_cache).past_key_values is None


def test_a_cache_in_use_is_never_dropped() -> None:
    model, _ = compiled(in_training(checkpointed=True))
    uncompressed = tiny_llava()
    for cache in (prefill(model, prompt()), prefill(uncompressed, text_prompt())):
        tokens = cache.get_seq_length()
        for ids in (torch.tensor([[7]]), torch.tensor([[7, 8, 9]])):
            with pytest.raises(CacheError, match=rf"gradient checkpointing.*holds {tokens} tokens.*model.eval\(\)"):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == tokens


def test_a_model_in_training_still_answers() -> None:
    """Without gradients nothing is checkpointed, so the cache is there and compressed."""
    model, backend = compiled(in_training(checkpointed=True))
    trained(model, use_cache=False)
    cache = prefill(model, prompt())
    assert isinstance(cache.layers[0].keys, LogicalKV) and cache.get_seq_length() == LENGTH
    assert step(model, cache).isfinite().all()
    assert backend.graphs == {"dense": 1, "prefill": 1, "decode": 1}


def test_gradients_through_an_eviction_are_refused_with_the_way_to_train() -> None:
    model, _ = compiled(in_training(checkpointed=False))
    with pytest.raises(GradientsRequiredError, match=r"torch.no_grad\(\).*to train, pass use_cache=False"):
        trained(model)


def test_torch_s_own_checkpointed_layers() -> None:
    """They do not know caches, so they would store each layer's keys twice."""
    stock = in_training(checkpointed=False)
    apply_activation_checkpointing(stock, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    model, backend = compiled(stock)
    assert_trains_as_stock(trained(model, use_cache=False), trained(stock, use_cache=False))
    assert backend.graphs == {"dense": 1}
    with pytest.raises(SplitDecoderError, match=r"checkpointed layer.*use_cache=False"):
        trained(model, use_cache=True)
    assert issubclass(SplitDecoderError, UnsupportedGraphError)
