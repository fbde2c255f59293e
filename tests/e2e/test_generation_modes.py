"""The decoding modes of `generate` besides greedy search: each follows the reference, or is refused."""

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer

from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference, reference_turn
from tests.support.running import kept_of
from tgvkv_compile import inspect_cache, tgvkv_backend
from tgvkv_compile.config import EvictionConfig
from tgvkv_compile.errors import AssistedDecodingError, CacheError, UnsupportedGraphError

BUDGET = 0.3
SHAPE = Shape(layers=2, seed=7)
SINGLE = ((5, 9),)
MIXED = ((5, 9), (3, 2, 6), (8,))
STEPS = 6


@pytest.fixture(scope="module")
def compiled() -> Any:
    """One model for all tests: what was compiled for one mode serves the others."""
    model = make_model(SHAPE)
    model.compile(backend=tgvkv_backend(BUDGET, lowering="eager"))
    return model


@pytest.fixture
def fresh_compiler() -> None:
    """In place of the one that forgets compiled code before each test."""
    torch.manual_seed(0)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    defaults = {"max_new_tokens": STEPS + 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**defaults, **options})


def check_against_reference(output: Any, inputs: dict[str, Tensor]) -> None:
    """The reference is fed with the tokens that were generated: logits of every step, and what is kept at the end."""
    chosen = output.sequences[:, inputs["input_ids"].shape[1] :]
    config = EvictionConfig(BUDGET)
    expected = reference(make_model(SHAPE), inputs, STEPS, config=config, image_token=IMAGE, forced=list(chosen.unbind(1)))
    kept = kept_of(output.past_key_values)
    compared = 0
    for sample, fragile in enumerate(expected.fragile):
        if fragile is None:
            for logits, wanted in zip(output.logits, expected.logits, strict=True):
                torch.testing.assert_close(logits[sample], wanted[sample], atol=1e-4, rtol=1e-4)
            assert kept[sample] == expected.kept[-1][sample]
            compared += 1
    assert compared >= len(expected.fragile) - 1, "choose another seed: float noise decides here"


def test_sampling(compiled: Any) -> None:
    """Mixed prompts: one picture, two, none. The seed decides, and decides again."""
    inputs = make_inputs(MIXED)
    torch.manual_seed(3)
    output = generate(compiled, inputs, do_sample=True, temperature=1.5)
    check_against_reference(output, inputs)
    greedy = generate(compiled, inputs)
    check_against_reference(greedy, inputs)
    assert not torch.equal(output.sequences, greedy.sequences)
    torch.manual_seed(3)
    assert torch.equal(generate(compiled, inputs, do_sample=True, temperature=1.5).sequences, output.sequences)


def test_several_sequences_per_prompt(compiled: Any) -> None:
    inputs = make_inputs(SINGLE)
    output = generate(compiled, inputs, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in inputs.items()}
    check_against_reference(output, repeated)


def test_chunked_prefill(compiled: Any) -> None:
    """The first chunk holds the picture; the rest is a text that joins, as in a next turn."""
    inputs, chunk = make_inputs(SINGLE), 25
    stock = make_model(SHAPE)
    if not torch.equal(generate(stock, inputs).sequences, generate(stock, inputs, prefill_chunk_size=chunk).sequences):
        pytest.skip(f"transformers {transformers.__version__} loses the picture of a chunked prefill, uncompiled too")
    output = generate(compiled, inputs, prefill_chunk_size=chunk)
    first = {name: value if name == "pixel_values" else value[:, :chunk] for name, value in inputs.items()}
    prompt = reference(make_model(SHAPE), first, 0, config=EvictionConfig(BUDGET), image_token=IMAGE)
    expected = reference_turn(prompt, inputs["input_ids"][:, chunk:], STEPS)
    assert expected.fragile == [None]
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], expected.continuation)
    assert kept_of(output.past_key_values) == expected.kept[-1]


class Words:
    """As much of a tokenizer as a streamer asks for."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return "".join(f"w{int(token)} " for token in tokens)


def test_streaming(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(SINGLE)
    output = generate(compiled, inputs)
    text = Words().decode(output.sequences[0, inputs["input_ids"].shape[1] :])
    generate(compiled, inputs, streamer=TextStreamer(Words(), skip_prompt=True))  # type: ignore[arg-type]
    assert capsys.readouterr().out.strip() == text.strip()

    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=300)  # type: ignore[arg-type]
    thread = threading.Thread(target=generate, args=(compiled, inputs), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1 and "".join(pieces).strip() == text.strip()


@pytest.mark.parametrize("with_assistant", [True, False], ids=["assistant", "prompt-lookup"])
def test_assisted_decoding_is_refused(compiled: Any, with_assistant: bool) -> None:
    options = {"assistant_model": make_model(SHAPE)} if with_assistant else {"prompt_lookup_num_tokens": 3}
    with pytest.raises(AssistedDecodingError, match="assisted decoding.*without assistant_model and prompt_lookup"):
        generate(compiled, make_inputs(SINGLE), **options)
    with pytest.raises(AssistedDecodingError):  # as the next turn, on a cache in use
        turn = generate(compiled, make_inputs(SINGLE))
        history = {"input_ids": torch.cat([turn.sequences, torch.tensor([[30, 41, 52]])], dim=1)}
        generate(compiled, history, past_key_values=turn.past_key_values, **options)


def test_a_static_cache_is_refused(compiled: Any) -> None:
    with pytest.raises(UnsupportedGraphError, match="StaticCache.*cache_implementation='dynamic'"):
        generate(compiled, make_inputs(SINGLE), cache_implementation="static")


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_refused(compiled: Any, implementation: str) -> None:
    with pytest.raises(CacheError, match=r"cache_implementation='offloaded'.*leave cache_implementation out"):
        generate(compiled, make_inputs(SINGLE), cache_implementation=implementation)
    check_against_reference(generate(compiled, make_inputs(SINGLE)), make_inputs(SINGLE))


def test_without_a_cache_nothing_is_evicted(compiled: Any) -> None:
    inputs = make_inputs(SINGLE)
    output = generate(compiled, inputs, use_cache=False, max_new_tokens=3)
    stock = generate(make_model(SHAPE), inputs, use_cache=False, max_new_tokens=3)
    assert torch.equal(output.sequences, stock.sequences)
    for logits, wanted in zip(output.logits, stock.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_shared_model_is_compressed(compiled: Any) -> None:
    """What the other tests of this file rest on."""
    report = inspect_cache(generate(compiled, make_inputs(SINGLE)).past_key_values)
    assert report.compressed and int(report.segment_lengths.sum()) < 0.6 * SHAPE.layers * report.logical_length
