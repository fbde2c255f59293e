"""Caches in int8 and float8, in compiled models: against a reference that quantises number by number."""

from typing import Any, get_args

import pytest
import torch

from tests.support.comparing import assert_same_run
from tests.support.models import IMAGE, Shape, make_inputs, make_model
from tests.support.reference import reference, reference_turn
from tests.support.running import positions_of, run, second_turn
from tests.support.talking import Conversation
from tgvkv_compile import inspect_cache, tgvkv_backend
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


def test_kept_positions_after_the_prompt_are_those_of_the_unquantised_run() -> None:
    inputs = make_inputs(PADDED)
    plain = run(compiled(), inputs, 0)
    for kv_dtype in DTYPES:
        assert run(compiled(kv_dtype=kv_dtype), inputs, 0).kept == plain.kept


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_a_later_turn_with_a_picture(kv_dtype: Any) -> None:
    """Survivors come back in the model's dtype, and are held in codes again."""
    inputs, question = make_inputs(((5, 9),)), make_inputs(((2, 6),))
    first = reference(make_model(SHAPE), inputs, 2, config=EvictionConfig(0.4, kv_dtype=kv_dtype), image_token=IMAGE)
    expected = reference_turn(first, question, 2)
    model = compiled(kv_dtype=kv_dtype)
    trace = run(model, inputs, 2)
    assert_same_run(second_turn(model, trace.cache, trace.mask, question, 2), expected)


@pytest.mark.parametrize(("kv_dtype", "budget"), [*((kv_dtype, 0.4) for kv_dtype in DTYPES), ("int4", 1.0)])
def test_copies_crops_and_growth(kv_dtype: Any, budget: float) -> None:
    """What moves slots about knows nothing of codes, nor of windows: they are in slots.

    At the larger budget a window has four entries.
    """
    config = EvictionConfig(budget, kv_dtype=kv_dtype)
    talk = Conversation(compiled(budget=budget, kv_dtype=kv_dtype, growth_reserve=2), make_model(SHAPE), config)
    talk.say(make_inputs(((5, 9),) if budget < 1 else ((20, 40),))).steps(3)
    other = talk.copy()
    talk.steps(12)
    other.crop(other.mask.shape[1] - 2).say({"input_ids": torch.tensor([[7, 8, 9]])}).steps(4)
    # Back behind the window, then as many new tokens as it has, and a picture.
    talk.crop(talk.mask.shape[1] - 9).say({"input_ids": torch.arange(5, 25)[None]}).say(make_inputs(((2, 6),))).steps(3)
    assert talk.session.fragile == other.session.fragile == [None]


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_samples_change_places(kv_dtype: Any) -> None:
    """As beams do, and as a batch that is taken apart does."""
    model, inputs = compiled(kv_dtype=kv_dtype), make_inputs(PADDED)
    whole = run(model, inputs, 6)
    trace = run(model, inputs, 2)
    trace.cache.reorder_cache(torch.tensor([1, 0]))
    mask, tokens = trace.mask[[1, 0]], trace.tokens[-1][[1, 0]]
    for step in range(3, 6):
        mask = torch.cat([mask, torch.ones_like(tokens[:, None])], dim=1)
        with torch.no_grad():
            output = model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -1:],
                past_key_values=trace.cache,
                use_cache=True,
            )
        tokens = output.logits[:, -1].argmax(-1)
        assert torch.equal(tokens, whole.tokens[step][[1, 0]])


@pytest.mark.parametrize("change", ["beams", "crop", "growth"])
def test_rows_move_whole(change: str) -> None:
    """What moves slots about knows nothing of codes: beams, `crop` and a cache that outgrows its arena give what they gave."""
    inputs = make_inputs(((5, 9),))
    options: dict[str, Any] = {"num_beams": 2} if change == "beams" else {}
    new = 12 if change == "growth" else 4
    answers = [
        compiled(budget=1.0, kv_dtype=kv_dtype, growth_reserve=2).generate(
            **inputs, max_new_tokens=new, do_sample=False, **options
        )
        for kv_dtype in (None, "int8")
    ]
    assert torch.equal(*answers)


def test_bytes() -> None:
    """On live storages, head dim 64, scales included; the parts add up."""
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=64)
    sizes = {}
    for kv_dtype in (None, *DTYPES):
        model = make_model(shape).to(torch.bfloat16)
        model.compile(backend=tgvkv_backend(1.0, kv_dtype=kv_dtype, lowering="eager"))
        with torch.no_grad():
            inputs = make_inputs(((250, 250),))
            report = inspect_cache(
                model(**{**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}, use_cache=True)
            )
        state = report._compact.state
        storages = (state.key_arena, state.value_arena)
        sizes[kv_dtype] = sum(arena.untyped_storage().nbytes() for arena in storages)
        parts = report.key_bytes + report.value_bytes + report.scale_bytes + report.window_bytes + report.reserve_bytes
        assert report.physical_bytes - parts == 4 * int(report.segment_lengths.sum())
        assert report.kv_dtype == kv_dtype
    assert sizes["int8"] <= 0.55 * sizes[None] and sizes["float8_e4m3fn"] <= 0.55 * sizes[None]


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_inductor(kv_dtype: Any) -> None:
    inputs = make_inputs(PADDED)
    expected = reference(make_model(SHAPE), inputs, 4, config=EvictionConfig(0.4, kv_dtype=kv_dtype), image_token=IMAGE)
    assert_same_run(run(compiled(kv_dtype=kv_dtype, lowering="inductor"), inputs, 4), expected)
