"""Where and beside what a compiled model runs: grad modes, autocast, threads, other compiled models, failures."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference
from tests.support.running import kept_of
from tgvkv_compile import explain, inspect_cache, tgvkv_backend
from tgvkv_compile.backend.dynamo import flags
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import ForeignCacheError, PaddingError, SplitDecoderError
from tgvkv_compile.passes.insert import insert_scoring

BUDGET = 0.3
SHAPE = Shape(layers=2, seed=7)
PROMPT = ((5, 9),)
STEPS = 4


def compiled_model(budget: float = BUDGET, shape: Shape = SHAPE) -> Any:
    model = make_model(shape)
    model.compile(backend=tgvkv_backend(budget, lowering="eager", growth_reserve=3))
    return model


def generate(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=steps + 1, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def check(output: Any, inputs: dict[str, Tensor], budget: float = BUDGET, shape: Shape = SHAPE) -> None:
    expected = reference(make_model(shape), inputs, STEPS, config=EvictionConfig(budget), image_token=IMAGE)
    assert expected.fragile == [None] * len(inputs["input_ids"]), "choose another seed: float noise decides here"
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected.continuation)
    assert kept_of(output.past_key_values) == expected.kept[-1]


def test_models_of_different_head_dims() -> None:
    """The second one's scale must not become an input of its graphs."""
    torch._dynamo.reset()
    inputs = make_inputs(PROMPT)
    for head_dim in (8, 16, 4):
        shape = Shape(layers=2, head_dim=head_dim, seed=7)
        check(generate(compiled_model(shape=shape), inputs), inputs, shape=shape)


def test_grad_modes() -> None:
    """A request may start under one and go on under the other."""
    model, inputs = compiled_model(), make_inputs(PROMPT)
    whole = generate(model, inputs)
    check(whole, inputs)
    ways = (torch.inference_mode, torch.no_grad)
    for first, second in (ways, ways[::-1]):
        with first():
            output = model(**inputs, use_cache=True)
        for step in range(STEPS):
            token = output.logits[:, -1:].argmax(-1)
            assert torch.equal(token, whole.sequences[:, step - STEPS - 1][:, None])
            with second():
                output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        assert kept_of(output.past_key_values) == kept_of(whole.past_key_values)


def test_autocast() -> None:
    """The whole budget under autocast is the uncompiled model under autocast, up to bfloat16's rounding."""
    inputs = make_inputs(PROMPT)
    exact = generate(make_model(SHAPE), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = generate(make_model(SHAPE), inputs)
        found = generate(compiled_model(1.0), inputs)
        small = generate(compiled_model(), inputs)
    for wanted, dense, compiled in zip(exact.logits, stock.logits, found.logits, strict=True):
        assert (compiled - wanted).norm() <= 2 * (dense - wanted).norm() + 1e-3
        if not torch.equal(compiled.argmax(-1), wanted.argmax(-1)) or not torch.equal(dense.argmax(-1), wanted.argmax(-1)):
            break  # from here on the tokens that were put in may differ
    report = inspect_cache(small)
    assert report.compressed and int(report.segment_lengths.sum()) < 0.6 * SHAPE.layers * report.logical_length


def test_the_newer_name_of_the_cache() -> None:
    """transformers 5.24 calls `past_key_values` `cache`; both work where the model takes both."""
    if not hasattr(CausalLMOutputWithPast(), "cache"):
        pytest.skip("this transformers knows the cache as past_key_values only")
    model, inputs = compiled_model(), make_inputs(PROMPT)
    whole = generate(model, inputs)
    output = model(**inputs, use_cache=True)
    for step in range(STEPS):
        token = output.logits[:, -1:].argmax(-1)
        assert torch.equal(token, whole.sequences[:, step - STEPS - 1][:, None])
        later = explain(model, {"input_ids": token, "cache": output.cache, "use_cache": True}, BUDGET, growth_reserve=3)
        assert [graph.kind for graph in later.graphs if graph.kind != "dense"] == ["decode"]
        with torch.no_grad():
            output = model(input_ids=token, cache=output.cache, use_cache=True)
    assert kept_of(output.cache) == kept_of(whole)


def test_a_device_map_of_one_device() -> None:
    """accelerate moves the model there and is done. Hooks around its modules, if asked for, split the decoder: refused."""
    inputs = make_inputs(PROMPT)
    model = accelerate.dispatch_model(make_model(SHAPE), {"": "cpu"})
    assert model.hf_device_map == {"": "cpu"}
    model.compile(backend=tgvkv_backend(BUDGET, lowering="eager"))
    check(generate(model, inputs), inputs)
    hooked = accelerate.dispatch_model(make_model(SHAPE), {"": "cpu"}, force_hooks=True)
    hooked.compile(backend=tgvkv_backend(BUDGET, lowering="eager"))
    with pytest.raises(SplitDecoderError, match="accelerate"):
        generate(hooked, inputs)


@pytest.mark.parametrize("round_", range(4))
def test_threads_on_one_model(round_: int) -> None:
    """Each its own requests, of its own shapes, all compiling at first: while one of them does, it is global state to torch.

    `torch.compiler.is_compiling()` is true in every thread then, so nothing may ask it where eager code could.
    """
    torch._dynamo.reset()
    model = compiled_model()
    prompts = [make_inputs(((5, 9), (3, 12))), make_inputs(((4, 11),), seed=2), make_inputs(((4, 7), (2, 5)), seed=round_)]
    outputs: list[list[Any]] = [[] for _ in prompts]
    together = threading.Barrier(len(prompts))

    def ask(index: int) -> None:
        torch.set_num_threads(1)
        together.wait()
        for _ in range(3):
            outputs[index].append(generate(model, prompts[index]))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for inputs, found in zip(prompts, outputs, strict=True):
        assert len(found) == 3
        for output in found:
            check(output, inputs)


def test_threads_have_the_flags_of_the_one_that_made_the_backend() -> None:
    """What is assigned to a flag of dynamo is seen by one thread only; one that was there before must see it as well."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threading.get_ident).result() != threading.get_ident()
        model, inputs = compiled_model(), make_inputs(PROMPT)
        seen = pool.submit(lambda: {name: getattr(torch._dynamo.config, name) for name in flags()}).result()
        assert seen == flags()
        check(pool.submit(generate, model, inputs).result(), inputs)


def test_two_models_in_one_process() -> None:
    """Other weights, other numbers of layers, other budgets; requests by turns."""
    inputs, other_shape = make_inputs(PROMPT), Shape(layers=3, seed=5)
    first, second = compiled_model(0.3), compiled_model(0.6, other_shape)
    for _ in range(2):
        check(generate(first, inputs), inputs)
        check(generate(second, inputs), inputs, 0.6, other_shape)


def test_the_second_compilation_of_a_model_wins() -> None:
    inputs = make_inputs(PROMPT)
    model = compiled_model(0.6)
    before = generate(model, inputs)
    check(before, inputs, 0.6)
    model.compile(backend=tgvkv_backend(0.3, lowering="eager", growth_reserve=3))
    check(generate(model, inputs), inputs, 0.3)
    with pytest.raises(ForeignCacheError), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=before.past_key_values, use_cache=True)


def test_a_prefill_that_fails_leaves_the_callers_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    score, failing = insert_scoring.rank_tokens, [False]

    def scored(*args: Any, **options: Any) -> Any:
        if failing[0] and not isinstance(args[0], FakeTensor):
            raise MemoryError("out of memory, says the test")
        return score(*args, **options)

    monkeypatch.setattr(insert_scoring, "rank_tokens", scored)
    model, inputs, cache = compiled_model(), make_inputs(PROMPT), DynamicCache()
    generate(model, inputs)
    failing[0] = True
    with pytest.raises(MemoryError):
        generate(model, inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0
    failing[0] = False
    right_padded = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    right_padded["attention_mask"][:, -1] = 0
    with pytest.raises(PaddingError), torch.no_grad():
        model(**right_padded, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    output = generate(model, inputs, past_key_values=cache)
    check(output, inputs)
    assert output.past_key_values is cache
