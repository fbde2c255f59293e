"""Where compiled code begins, and whom it leaves alone."""

import copy
import functools
import inspect
import threading
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.backend.tiny import prompt, tiny_llava
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.errors import ConfigError, UnsupportedGraphError


def generate(model: Any, inputs: Any, tokens: int = 3) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


def _ask(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


class Stock:
    """Another backend, and how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.graphs += 1
        return gm.forward


def test_stock_compile_of_the_same_class_is_as_it_was() -> None:
    """Its graphs hold merge, decoder and head in one, before and after."""
    torch._dynamo.reset()
    ours = tiny_llava()
    ours.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    generate(ours, prompt())
    stock = Stock()
    other = tiny_llava(seed=1)
    other.compile(backend=stock)
    found = generate(other, prompt())
    assert torch.equal(found, generate(tiny_llava(seed=1), prompt()))
    assert stock.graphs <= 3  # prompt, first step, steps of any length


def test_a_model_that_is_not_compiled_is_as_it_was() -> None:
    tgvkv_backend(0.3, lowering="eager")
    model = tiny_llava()
    generate(model, prompt())
    assert model.model.language_model._compiled_call_impl is None
    assert "pixel_values" in inspect.signature(model.forward).parameters


def test_a_wrapped_forward_and_a_function_around_the_model() -> None:
    expected = None
    for way in ("compile", "forward", "function", "wrapped"):
        torch._dynamo.reset()
        model, backend = tiny_llava(), tgvkv_backend(0.3, lowering="eager")
        call: Any = model
        if way == "compile":
            model.compile(backend=backend)
        elif way == "forward":
            model.forward = torch.compile(model.forward, backend=backend)
        elif way == "wrapped":
            call = torch.compile(model, backend=backend)
        else:
            call = torch.compile(functools.partial(_ask, model), backend=backend)
        with torch.no_grad():
            logits = call(**prompt()).logits
        assert backend.graphs == {"prefill": 1}, way
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected)


def test_fullgraph_is_refused_with_the_remedy() -> None:
    torch._dynamo.reset()
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"), fullgraph=True)
    with pytest.raises(ConfigError, match=r"fullgraph=True cannot be honoured.*Leave it out"):
        generate(model, prompt())


def test_a_model_that_answers_without_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all of it would run uncompressed, silently."""
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.model.multi_modal_projector.act)
    with pytest.raises(UnsupportedGraphError, match=r"never called GELUActivation.*nothing was compressed"):
        generate(model, {"input_ids": prompt()["input_ids"].clamp(max=50)})


def test_another_backend_on_the_same_model() -> None:
    torch._dynamo.reset()
    model = tiny_llava()
    first, second = tgvkv_backend(0.3, lowering="eager"), tgvkv_backend(1.0, lowering="eager")
    model.compile(backend=first)
    generate(model, prompt())
    model.compile(backend=second)
    assert torch.equal(generate(model, prompt()), generate(tiny_llava(), prompt()))
    assert first.graphs == second.graphs == {"prefill": 1, "decode": 1}


def test_a_copy_of_a_compiled_model_is_not_compiled() -> None:
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    generate(model, prompt())
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, prompt()), generate(tiny_llava(), prompt()))
    twin.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    assert torch.equal(generate(twin, prompt()), generate(model, prompt()))


def test_a_decoder_that_was_compiled_by_itself() -> None:
    model = tiny_llava()
    model.model.language_model.compile(backend="eager")
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    with pytest.raises(ConfigError, match=r"LlamaModel was compiled by itself.*compile the\s+whole model only"):
        generate(model, prompt())


def test_an_error_on_the_way_leaves_nothing_behind() -> None:
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    wrong = prompt()
    wrong["pixel_values"] = torch.cat([wrong["pixel_values"]] * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**wrong)
    found = generate(model, prompt())
    fresh = tiny_llava()
    fresh.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    assert torch.equal(found, generate(fresh, prompt()))


def test_a_picture_of_an_earlier_turn_given_to_generate_again() -> None:
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    inputs = prompt()
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
    held = first.past_key_values.get_seq_length()
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 0"):
        model.generate(**turn, pixel_values=inputs["pixel_values"], max_new_tokens=2)
    assert first.past_key_values.get_seq_length() == held  # and the cache is still good
    assert model.generate(**turn, max_new_tokens=2).shape[1] == ids.shape[1] + 2


def test_a_class_that_was_loaded_after_the_backend_was_made() -> None:
    backend = tgvkv_backend(0.3, lowering="eager")

    class Later(LlavaForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert not hasattr(Later.forward, "_tgvkv_cut")
    torch.compile(tiny_llava(), backend=backend)
    assert hasattr(Later.forward, "_tgvkv_cut")


def answers(model: Any, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Logits of a prompt and of three steps by direct calls; a mask is given with the steps if it is with the prompt."""
    found, cache, mask = [], None, inputs.get("attention_mask")
    with torch.no_grad():
        for _ in range(4):
            given = {} if mask is None else {"attention_mask": mask}
            output = model(**{**inputs, **given}, past_key_values=cache, **options)
            found.append(output.logits[:, -1])
            cache, inputs = output.past_key_values, {"input_ids": output.logits[:, -1:].argmax(-1)}
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return found


def test_a_mask_of_ones_is_none() -> None:
    """For one sample; its steps are not read, and a prompt that is padded keeps its mask."""
    model, backend = tiny_llava(), tgvkv_backend(0.3, lowering="eager")
    model.compile(backend=backend)
    inputs = prompt()
    mask = torch.ones_like(inputs["input_ids"])
    wanted = answers(model, inputs)
    found = answers(model, {**inputs, "attention_mask": mask})
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert backend.graphs == {"prefill": 1, "decode": 1}
    padded = {**inputs, "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.int64), inputs["input_ids"]], dim=1)}
    padded["attention_mask"] = (torch.arange(padded["input_ids"].shape[1]) >= 3).long()[None]
    answers(model, padded)
    assert backend.graphs == {"prefill": 2, "decode": 2}


def test_a_mask_of_ones_says_that_positions_are_of_one_sequence() -> None:
    """transformers takes positions that begin again, without mask and cache, for packed sequences."""
    model, given = tiny_llava(), prompt()
    ids = given["input_ids"]
    given["attention_mask"], given["position_ids"] = torch.ones_like(ids), torch.arange(ids.shape[1])[None] % 20
    with torch.no_grad():
        wanted = model(**given, use_cache=False).logits
        model.compile(backend=tgvkv_backend(1.0, lowering="eager"))
        torch.testing.assert_close(model(**given, use_cache=False).logits, wanted)


@pytest.mark.slow
def test_threads_that_encode_pictures_on_one_model() -> None:
    model = tiny_llava()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    requests = [prompt(seed=seed) for seed in range(3)]
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in requests]
    errors: list[BaseException] = []

    def ask(which: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(100):
                    torch.testing.assert_close(model(**requests[which]).logits, wanted[which])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
