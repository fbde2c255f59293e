"""Every error that a user can cause: it names the thing, the value and the remedy."""

import copy
import functools
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tgvkv_compile
from tests.backend.tiny import prefill as llava_prefill
from tests.backend.tiny import prompt, tiny_llava
from tests.backend.tiny import step as llava_step
from tests.passes.decoder import Decoder, causal, features, masked, softcapped, tokens
from tests.runtime.requests import compiled, handles, prefill, step
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import (
    CacheError,
    ConfigError,
    ForeignCacheError,
    GradientsRequiredError,
    NoAttentionError,
    PaddingError,
    SplitDecoderError,
    StaleCacheError,
    UnknownOptionError,
    UnsupportedGraphError,
)
from tgvkv_compile.lower import Lowered
from tgvkv_compile.runtime.logical import LogicalKV

ROOT = Path(__file__).parents[2]


# Options# Options


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (0, "an int budget is tokens per layer and must be >= 1"),
        (-3, "an int budget is tokens per layer and must be >= 1"),
        (0.0, "must lie in (0, 1]; for a number of tokens per layer give an int"),
        (-0.1, "must lie in (0, 1]; for a number of tokens per layer give an int"),
        (1.5, "must lie in (0, 1]; for a number of tokens per layer give an int"),
        (float("nan"), "must lie in (0, 1]; for a number of tokens per layer give an int"),
        (float("inf"), "must lie in (0, 1]; for a number of tokens per layer give an int"),
        (True, "is a bool; give a float in (0, 1]"),
        ("x", "is a str; give a float in (0, 1]"),
    ],
)
def test_budget(budget: Any, why: str) -> None:
    for make in (tgvkv_backend, lambda value: tgvkv_compile.compile(torch.nn.Linear(1, 1), value)):
        with pytest.raises(ConfigError) as caught:
            make(budget)
        assert f"budget={budget!r}" in str(caught.value) and why in str(caught.value)
    with pytest.raises(ConfigError, match="budget="):
        tgvkv_compile.explain(torch.nn.Linear(1, 1), {}, budget)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_of": "text"}, "budget_of='text' is not known; choose one of 'all', 'vision'"),
        ({"budgeting": "even"}, "budgeting='even' is not known; choose one of 'tvb', 'waterfill', 'uniform'"),
        ({"decode": "drop"}, "decode='drop' is not known; choose one of 'ratio', 'fixed', 'keep'"),
        ({"lowering": "cuda"}, "lowering='cuda' is not known; choose one of 'inductor', 'aot_eager', 'eager'"),
        ({"mode": "fast"}, "mode='fast' is not known; choose one of None, 'reduce-overhead', 'max-autotune'"),
        ({"on_unsupported": "warn"}, "on_unsupported='warn' is not known; choose one of 'raise', 'passthrough'"),
        ({"sink_tokens": -1}, "sink_tokens=-1 must be an int >= 0"),
        ({"growth_reserve": 0}, "growth_reserve=0 must be an int >= 1"),
        ({"growth_reserve": 2.0}, "growth_reserve=2.0 must be an int >= 1"),
        ({"prefill_cap": 0.5}, "prefill_cap=0.5 must be a number >= 1, a multiple of the mean budget, or None"),
        ({"prefill_cap": True}, "prefill_cap=True must be a number >= 1"),
        ({"prefill_cap": 2.0, "budget_of": "vision"}, "prefill_cap=2.0 needs budget_of='all'"),
        ({"stop_after": "insert"}, "stop_after='insert' is not a pass; choose one of materialise_masks,"),
        ({"lowering": "eager", "mode": "reduce-overhead"}, "mode='reduce-overhead' is for lowering='inductor'"),
        ({"options": ["a"]}, "options=['a'] must be a dict of Inductor options"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tgvkv_backend(0.1, **options)
    assert message in str(caught.value)


def test_unknown_option() -> None:
    for make in (
        lambda: tgvkv_backend(0.1, bugdet_of="all"),
        lambda: tgvkv_compile.compile(torch.nn.Linear(1, 1), 0.1, bugdet_of="all"),
        lambda: tgvkv_compile.explain(torch.nn.Linear(1, 1), {}, 0.1, bugdet_of="all"),
    ):
        with pytest.raises(UnknownOptionError) as caught:
            make()
        text = str(caught.value)
        assert "unknown option 'bugdet_of'" in text and "did you mean 'budget_of'?" in text and "growth_reserve" in text
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bugdet": 0.1}, "unknown option 'bugdet' of backend 'tgvkv'; did you mean 'budget'?"),
        ({"budget": 2.0}, "budget=2.0 is out of range"),
        ({"configure_dynamo": False}, "configure_dynamo=False cannot be honoured by name"),
    ],
)
def test_options_by_name(options: dict[str, Any], message: str) -> None:
    model = torch.compile(torch.nn.Linear(2, 2), backend="tgvkv", options=options)
    with pytest.raises(Exception) as caught:  # dynamo wraps what a backend raises
        model(torch.ones(1, 2))
    assert message in str(caught.value)


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ConfigError, match="model is a function; give a torch.nn.Module"):
        tgvkv_compile.compile(lambda x: x, 0.1)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"wrapped by torch.compile\(\); give the model itself"):
        tgvkv_compile.compile(torch.compile(torch.nn.Linear(1, 1)), 0.1)  # type: ignore[type-var]


# Inputs


def test_gradients_are_refused() -> None:
    model = compiled()
    with pytest.raises(GradientsRequiredError, match=r"torch.no_grad\(\) or torch.inference_mode\(\)"):
        model(tokens(), features())
    caches = prefill(model)
    with pytest.raises(GradientsRequiredError):
        model(tokens()[:, :1], None, caches)
    assert step(model, caches)[0].isfinite().all()  # nothing was broken by it


def test_right_padding_is_refused_and_left_padding_is_not() -> None:
    model = compiled(attend=masked)
    right = causal(2, 19)
    right[1, :, :, -3:] = False
    with pytest.raises(PaddingError) as caught, torch.no_grad():
        model(tokens(2), features(2), None, right)
    assert "sample 1" in str(caught.value) and "padding_side = 'left'" in str(caught.value)
    with torch.no_grad():
        _, caches = model(tokens(2), features(2), None, causal(2, 19, left=3))
    assert handles(caches)


# Caches in the wrong place


def test_cache_moved_elsewhere() -> None:
    for handle in handles(prefill(compiled())):
        with pytest.raises(CacheError, match=r"to\(meta\).*cannot be moved from cpu; move the model and the inputs"):
            handle.to("meta")


def test_cache_of_another_model_with_the_same_backend() -> None:
    backend = tgvkv_backend(0.4, lowering="eager")
    one, other = Decoder(), Decoder()
    one.compile(backend=backend)
    other.compile(backend=backend)
    caches = prefill(one)
    step(other, prefill(other))
    with pytest.raises(ForeignCacheError, match="made by another model.*give each model the caches that it made itself"):
        step(other, caches)
    step(one, caches)  # and it is still good


def test_cache_of_another_backend() -> None:
    one, other = compiled(0.3), compiled(0.5)
    caches = prefill(one)
    with pytest.raises(ForeignCacheError, match="compressed by another backend.*the caches that it made itself"):
        step(other, caches)
    step(one, caches)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_cache_in_a_graph_of_a_foreign_backend(backend: str) -> None:
    caches = prefill(compiled())
    other = Decoder()
    other.compile(backend=backend)
    with pytest.raises(CacheError, match=r"cat\(\).*handles without data.*compiled by another backend"):
        step(other, caches)


def test_foreign_graphs_cannot_compute_on_it() -> None:
    handle = handles(prefill(compiled()))[0]
    whole = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compressed by tgvkv, in a graph for another backend"):
        whole(handle)
    with pytest.raises(CacheError, match=r"mul\(\)"):
        torch.compile(lambda x: x * 2, backend="eager")(handle)
    assert torch.compile(lambda x: x.shape[2] + 1, backend="eager")(handle) == handle.shape[2] + 1


def test_our_own_graphs_cannot_compute_on_it_either() -> None:
    handle = handles(prefill(compiled()))[0]
    with pytest.raises(UnsupportedGraphError, match="other than by a KV append"):
        torch.compile(lambda x: x.sum(), backend=tgvkv_backend(0.3, lowering="eager"))(handle)


def test_cache_in_eager_code() -> None:
    model = compiled()
    caches = prefill(model)
    message = r"cat\(\).*runs uncompiled.*TORCH_LOGS=recompiles"
    with pytest.raises(CacheError, match=message):
        step(Decoder(), copy.deepcopy(caches))
    with pytest.raises(CacheError, match=message), torch.no_grad():
        model.forward(tokens()[:, :1], None, copy.deepcopy(caches))
    with pytest.raises(CacheError, match=message), torch.compiler.set_stance("force_eager"):
        step(model, copy.deepcopy(caches))
    step(model, copy.deepcopy(caches))
    torch._dynamo.reset()
    with pytest.raises(CacheError, match=message), torch._dynamo.config.patch(disable=True):
        step(model, caches)


def test_a_wrapped_backend_is_still_ours() -> None:
    backend = tgvkv_backend(0.4, lowering="eager")

    @functools.wraps(backend)
    def wrapped(gm: Any, inputs: Any) -> Any:
        return backend(gm, inputs)

    for kind in (wrapped, functools.partial(backend), "tgvkv"):
        torch._dynamo.reset()
        model = Decoder()
        options = {"budget": 0.4, "lowering": "eager"} if kind == "tgvkv" else None
        model.compile(backend=kind, options=options)
        assert step(model, prefill(model))[0].isfinite().all()

    def unknown(gm: Any, inputs: Any) -> Any:
        return backend(gm, inputs)

    torch._dynamo.reset()
    model = Decoder()
    model.compile(backend=unknown)
    with pytest.raises(CacheError, match="a function around it needs functools.wraps"):
        step(model, prefill(model))


def test_stale_cache() -> None:
    model = compiled()
    old = prefill(model)
    step(model, old)
    with pytest.raises(StaleCacheError, match=r"19 tokens, but 20 have been put into it.*copy.deepcopy"):
        step(model, old)


def test_a_step_that_fails_half_way_breaks_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    first = prefill(model)
    twin = copy.deepcopy(first)
    _, caches = step(model, first)
    run = Lowered.__call__

    def failing(self: Lowered, *inputs: Any) -> list[Any]:
        run(self, *inputs)  # the arena is written to
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Lowered, "__call__", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(model, caches)
    with pytest.raises(CacheError, match="incomplete: a decode step failed half-way; start the request again"):
        step(model, caches)
    with pytest.raises(CacheError, match="incomplete"):
        copy.deepcopy(caches)
    assert step(model, twin)[0].isfinite().all()  # a copy made before is not affected


# Graphs


def _break_in_a_layer(model: Any) -> None:
    def broken(module: Any, args: Any, output: Any) -> None:
        torch._dynamo.graph_break()

    model.model.language_model.layers[0].mlp.register_forward_hook(broken)


def llava(budget: float = 0.3) -> Any:
    return tgvkv_compile.compile(tiny_llava(), budget, lowering="eager")


def test_a_split_decoder() -> None:
    model = llava()
    _break_in_a_layer(model)
    with pytest.raises(SplitDecoderError) as caught:
        llava_prefill(model, prompt())
    text = str(caught.value)
    assert "dynamo broke the graph at" in text and "graph_break" in text
    assert "torch._dynamo.config.capture_scalar_outputs" in text and "TORCH_LOGS=graph_breaks" in text


def test_a_decoder_that_splits_only_while_decoding() -> None:
    model = llava()
    cache = llava_prefill(model, prompt())
    _break_in_a_layer(model)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedGraphError) as caught:
        llava_step(model, cache)
    assert "dynamo" in str(caught.value) and "TORCH_LOGS=graph_breaks" in str(caught.value)


def test_a_break_after_the_decoder_is_fine() -> None:
    model = llava()

    def broken(module: Any, args: Any, output: Any) -> None:
        torch._dynamo.graph_break()

    model.model.register_forward_hook(broken)  # the outermost forward goes on to the logits
    cache = llava_prefill(model, prompt())
    assert isinstance(cache.layers[0].keys, LogicalKV)
    assert llava_step(model, cache).isfinite().all()


def test_the_recompile_limit_raises() -> None:
    model = compiled()
    torch._dynamo.config.recompile_limit = 2
    caches = prefill(model)  # one graph for the prompt, one for a step
    step(model, caches)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        prefill(model, 3)


class _Merging(torch.nn.Module):
    """Merges vision features and returns, without any attention."""

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> Any:
        merged = embeds.masked_scatter(mask, features)
        return merged, torch.cat([torch.tensor([]), merged[:, None]], dim=-2)


def test_an_append_that_no_attention_reads() -> None:
    model = torch.compile(_Merging(), backend=tgvkv_backend(0.3, lowering="eager"))
    arguments = (torch.zeros(1, 5, 3), torch.zeros(1, 5, 1, dtype=torch.bool), torch.ones(3))
    with pytest.raises(UnsupportedGraphError) as caught, torch.no_grad():
        model(*arguments)
    assert "this reads the KV append %cat" in str(caught.value) and "test_errors.py:" in str(caught.value)


class _MergingOnly(_Merging):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0]


def test_no_attention_at_all() -> None:
    model = torch.compile(_MergingOnly(), backend=tgvkv_backend(0.3, lowering="eager"))
    with pytest.raises(NoAttentionError) as caught, torch.no_grad():
        model(torch.zeros(1, 5, 3), torch.zeros(1, 5, 1, dtype=torch.bool), torch.ones(3))
    text = str(caught.value)
    assert "masked_scatter" in text or "merged" in text
    assert "test_errors.py:" in text and "no attention was found" in text and "nothing would be evicted" in text


def test_unknown_form_of_attention() -> None:
    with pytest.raises(UnsupportedGraphError) as caught:
        prefill(compiled(attend=softcapped))
    text = str(caught.value)
    assert "2 sites cannot be rewritten" in text and text.count("= tanh:") == 2
    assert "decoder.py:" in text and "torch.tanh(weights / 50.0)" in text


def test_passthrough_runs_dense_and_says_so_once() -> None:
    model = compiled(attend=softcapped, on_unsupported="passthrough")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        caches = prefill(model)
        prefill(model, 2)  # another graph with the same shortcoming
        logits, _ = step(model, caches)
    ours = [str(warning.message) for warning in told if "tgvkv" in str(warning.message)]
    assert len(ours) == 1 and "running uncompressed (on_unsupported='passthrough')" in ours[0] and "tanh" in ours[0]
    assert not isinstance(caches[0][0], LogicalKV)
    plain = Decoder(softcapped)
    torch.testing.assert_close(logits, step(plain, prefill(plain))[0])


def test_passthrough_does_not_let_a_compressed_cache_through() -> None:
    handle = handles(prefill(compiled()))[0]
    backend = tgvkv_backend(0.3, lowering="eager", on_unsupported="passthrough")
    with pytest.raises(UnsupportedGraphError, match="other than by a KV append"):
        torch.compile(lambda x: x.sum(), backend=backend)(handle)


def test_text_only_prompts_run_dense() -> None:
    model, plain = compiled(), Decoder()
    with torch.no_grad():
        _, caches = model(tokens()[:, :6])
        _, expected = plain(tokens()[:, :6])
    assert not isinstance(caches[0][0], LogicalKV)
    torch.testing.assert_close(step(model, caches)[0], step(plain, expected)[0])


# A backend that nothing reaches


def run_script(body: str) -> str:
    """What a process that runs `body` says."""
    code = "import torch, tgvkv_compile\nfrom tests.backend.tiny import *\n" + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


UNREACHED = "a backend was made and never reached, so nothing was compressed"


def test_a_backend_that_is_never_reached_says_so_at_exit() -> None:
    said = run_script("""
        model = torch.compile(tiny_llava(), backend=tgvkv_compile.tgvkv_backend(0.3, lowering="eager"))
        model.generate(**prompt(), max_new_tokens=2)  # OptimizedModule forwards the attribute: the uncompiled model
    """)
    assert UNREACHED in said
    assert "instead of torch.compile(model) the model itself" in said and "model.compile(backend=...)" in said


def test_a_backend_that_was_reached_says_nothing() -> None:
    said = run_script("""
        model = torch.compile(torch.nn.Linear(2, 2), backend=tgvkv_compile.tgvkv_backend(0.3, lowering="eager"))
        model(torch.ones(1, 2))
    """)
    assert UNREACHED not in said
