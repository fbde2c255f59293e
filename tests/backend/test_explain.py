import dataclasses
import warnings
from typing import Any

import pytest
import torch

import tgvkv_compile
from tests.backend.tiny import LENGTH, prefill, prompt, text_prompt, tiny_llava
from tests.passes.decoder import Decoder, Layer, SlidingLayer, features, returned, softcapped, tokens, written_out
from tests.runtime.requests import compiled, handles, kept, step
from tests.runtime.requests import prefill as toy_prefill
from tgvkv_compile import explain
from tgvkv_compile.backend.explanation import Explanation
from tgvkv_compile.errors import ConfigError, NoAttentionError, SplitDecoderError, UnsupportedGraphError
from tgvkv_compile.lower import lowered
from tgvkv_compile.runtime.logical import LogicalKV

FLAGS = (
    *("capture_scalar_outputs", "capture_dynamic_output_shape_ops", "recompile_limit", "accumulated_recompile_limit"),
    "fail_on_recompile_limit_hit",
)


def flags() -> dict[str, Any]:
    return {name: getattr(torch._dynamo.config, name) for name in FLAGS}


def inputs(batch: int = 1) -> dict[str, Any]:
    return {"ids": tokens(batch), "features": features(batch)}


def test_a_vision_language_model() -> None:
    model = tiny_llava()
    before = flags()
    report = explain(model, prompt(), 0.2, growth_reserve=1)
    assert flags() == before
    assert report.model == "LlavaForConditionalGeneration" and report.problems == ()
    (found,) = [graph for graph in report.graphs if graph.kind == "prefill"]
    assert [site.layer for site in found.sites] == [0, 1]
    for site in found.sites:
        assert (site.form, site.heads, site.kv_heads, site.head_dim) == ("sdpa", 4, 2, 8)
        assert "sdpa_attention.py:" in site.source and "scaled_dot_product_attention" in site.source
    assert found.missed == () and found.broke_at is None
    assert len(report.graphs) == 1  # the vision tower and the merge run before it
    text = str(report)
    assert len(text.splitlines()) < 40 and all(len(line) <= 160 for line in text.splitlines())
    for part in (
        "LlavaForConditionalGeneration, budget=0.2 of all",
        ": prefill, vision tokens merged, empty cache",
        "layers 0 to 1: sdpa, 4 heads on 2, head dim 8",
        "plan: compress the KV of 2 layers",
        f"prompt: 1 x {LENGTH} tokens, 2 layers",
    ):
        assert part in text
    assert not isinstance(prefill(model, prompt()).layers[0].keys, LogicalKV)  # it is not compiled


@pytest.mark.parametrize("options", [
    {}, {"budget": 1.0}, {"budget": 5}, {"growth_reserve": 1}, {"decode": "keep"}, {"budgeting": "uniform"},
    {"budget": 0.5, "budget_of": "vision", "growth_reserve": 2},
])  # fmt: skip
def test_the_capacity_is_that_of_the_real_cache(options: dict[str, Any]) -> None:
    options = {"budget": 0.4, **options}
    capacity = explain(Decoder(), inputs(2), **options).capacity
    assert capacity is not None
    caches = toy_prefill(compiled(**options), 2)
    state = handles(caches)[0].compact.state
    real = tgvkv_compile.inspect_cache(_Layers(caches))
    assert capacity.arena_slots == state.key_arena.shape[2]
    assert capacity.compact_bytes == real.physical_bytes and capacity.full_bytes == real.logical_bytes
    assert capacity.saved_bytes == real.logical_bytes - real.physical_bytes
    assert (capacity.num_layers, capacity.batch_size, capacity.prompt_length) == (2, 2, 19)
    assert int(state.segment_len.sum(1).max()) <= capacity.kept_tokens <= 38
    assert capacity.tokens_per_layer == capacity.kept_tokens / 2


class _Layers:
    """What `inspect_cache` looks into."""

    def __init__(self, caches: Any) -> None:
        class Layer:
            def __init__(self, keys: Any, values: Any) -> None:
                self.keys, self.values = keys, values

        self.layers = [Layer(*pair) for pair in caches]


def test_a_text_only_prompt() -> None:
    report = explain(tiny_llava(), text_prompt())
    assert report.capacity is None and report.problems == ()
    assert [len(graph.sites) for graph in report.graphs] == [2]
    assert "plan: the prompt is text-only (no vision features are merged): it would run dense" in str(report)


def test_misses_are_listed_not_raised() -> None:
    report = explain(Decoder(softcapped), inputs())
    (graph,) = report.graphs
    assert graph.kind == "dense" and [miss.target for miss in graph.missed] == ["tanh", "tanh"]
    assert isinstance(graph.problem, UnsupportedGraphError) and report.problems == (graph.problem,)
    assert report.capacity is None
    text = str(report)
    assert "missed %" in text and "= tanh: unknown attention form" in text and "passes/decoder.py:" in text
    assert "plan: the decoder cannot be rewritten; the backend would raise UnsupportedGraphError" in text
    report = explain(Decoder(returned, probabilities=True), inputs())
    assert "output_attentions" in str(report)


def test_misses_of_a_text_only_prompt_are_listed_too() -> None:
    report = explain(Decoder(softcapped), {"ids": tokens()[:, :6]})
    assert [miss.target for miss in report.graphs[0].missed] == ["tanh", "tanh"]
    assert report.problems == () and "would run dense" in report.plan


def test_other_forms_and_layers() -> None:
    report = explain(Decoder(written_out, kv_heads=4, layers=3), inputs())
    assert "layers 0 to 2: eager, 4 heads on 4, head dim 4" in str(report)
    report = explain(Decoder(kind=(SlidingLayer, Layer)), inputs())
    assert [site.layer for site in report.graphs[0].sites] == [0]
    assert report.capacity is not None and report.capacity.num_layers == 1


def test_a_split_decoder_is_reported_with_its_place() -> None:
    model = tiny_llava()

    def broken(module: Any, args: Any, output: Any) -> None:
        torch._dynamo.graph_break()

    model.model.language_model.layers[0].mlp.register_forward_hook(broken)
    report = explain(model, prompt())
    first, *rest = report.problems
    assert type(first) is SplitDecoderError
    assert all("the decoder is handed embeddings" in str(problem) for problem in rest)  # what comes after the break
    assert any("graph_break" in (graph.broke_at or "") for graph in report.graphs)
    assert "the backend would raise SplitDecoderError" in str(report)
    assert "dynamo broke the graph at" in str(report)


def test_nothing_found() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    with pytest.raises(NoAttentionError) as caught:
        explain(Head(), {"x": torch.ones(1, 3)})
    text = str(caught.value)
    assert "any graph of Head" in text and "nearest candidate is %" in text and "= linear at" in text
    assert "use_cache=True" in text and "test_explain.py:" in text


def test_without_a_cache_the_nearest_candidate_is_the_attention() -> None:
    class Uncached(Decoder):
        def forward(self, ids: Any, features: Any) -> Any:  # type: ignore[override]
            return super().forward(ids, features)[0]

    with pytest.raises(NoAttentionError, match="nearest candidate is %.* = scaled_dot_product_attention at .*decoder.py"):
        explain(Uncached(), inputs())


def test_nothing_is_compiled_and_the_compiled_model_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    first = toy_prefill(model)
    expected, _ = step(model, first)
    implementation = model._compiled_call_impl
    with monkeypatch.context() as patch:
        for name in ("lower_rewritten", "lower_dense"):
            patch.setattr(lowered, name, lambda *_, **__: pytest.fail("something was lowered"))
        report = explain(model, inputs(), 0.9)
    assert report.capacity is not None and model._compiled_call_impl is implementation
    again = toy_prefill(model)
    torch.testing.assert_close(step(model, again)[0], expected)
    assert tgvkv_compile.inspect_cache(_Layers(again)).compressed
    torch._dynamo.config.patch(error_on_recompile=True)(lambda: step(model, toy_prefill(model)))()  # still compiled


def test_a_wrapped_model() -> None:
    wrapped = torch.compile(Decoder(), backend="eager")
    assert explain(wrapped, inputs()).model == "Decoder"


def test_dynamo_flags_are_left_alone() -> None:
    before = flags()
    seen = []

    model = Decoder()
    look = torch._dynamo.disable(lambda *_: seen.append(flags()))
    model.register_forward_hook(lambda *_: look())
    explain(model, inputs(), configure_dynamo=False)
    assert seen == [before] and flags() == before
    explain(model, inputs())
    assert seen[1]["capture_scalar_outputs"] and seen[1] != before and flags() == before


def test_it_leaves_no_warning_about_unreached_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    monkeypatch.setattr("atexit.register", lambda *args: registered.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        explain(Decoder(), inputs())
    assert registered == []


def test_gradients_are_not_asked_for() -> None:
    torch.set_grad_enabled(True)
    assert explain(Decoder(), inputs()).capacity is not None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("count", "picture", "kind", "plan"),
    [
        (1, False, "decode", "append one token"),
        (5, False, "continuation", "all its tokens are kept"),
        (19, True, "vision_continuation", "share the budget out again over what the compressed cache still holds"),
    ],
)
def test_a_later_turn_is_explained(count: int, picture: bool, kind: str, plan: str) -> None:
    model = compiled()
    caches = toy_prefill(model)
    before = kept(caches)
    report = explain(model, {"ids": tokens()[:, :count], "features": features() if picture else None, "past": caches})
    assert [graph.kind for graph in report.graphs] == [kind] and report.problems == () and report.capacity is None
    assert plan in report.plan
    assert kept(caches) == before
    step(model, caches)


def test_a_first_picture_after_text_is_explained() -> None:
    model = Decoder()
    _, caches = model(tokens()[:, :6])
    report = explain(model, {**inputs(), "past": caches})
    assert [graph.kind for graph in report.graphs] == ["late_prefill"] and report.problems == ()
    assert "which holds text only so far" in report.plan


def test_what_is_not_a_model() -> None:
    with pytest.raises(ConfigError, match="model is a function"):
        explain(lambda x: x, {})  # type: ignore[arg-type]


def test_reports_are_frozen() -> None:
    report = explain(Decoder(), inputs())
    assert isinstance(report, Explanation)
    for record in (report, report.graphs[0], report.graphs[0].sites[0], report.capacity):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.model = 1  # type: ignore[union-attr, misc]
