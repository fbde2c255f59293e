"""The small real model: its files load offline, its questions are sound, and it answers them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)

from tgvkv_compile.digits import Question, held_out_questions, load_model, load_processor, model_dir
from tgvkv_compile.digits.pictures import CELL, COLOUR_NAMES, COLOURS, GRID, PICTURE, View, draw, random_board
from tgvkv_compile.digits.scans import HELD_OUT_FILE, load_held_out
from tools.digits.evaluate import generated, score, teacher_forced
from tools.digits.packing import NO_TARGET, OPENING_IDS, draw_questions, pack
from tools.digits.processor_files import PIXEL_MEAN, PIXEL_STD, WORD_IDS, word_ids
from tools.digits.split_scans import split_scans
from tools.digits.train_eyes import see

VISION_TOKENS = GRID * GRID
needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the training scans come from scikit-learn"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return load_model()


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return load_processor()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return held_out_questions(40, seed=0)


def test_stock_classes_load_the_folder(model: LlavaForConditionalGeneration) -> None:
    processor = AutoProcessor.from_pretrained(model_dir())  # type: ignore[no-untyped-call]
    assert isinstance(processor, LlavaProcessor)
    assert processor.tokenizer.padding_side == "left"
    by_auto = AutoModelForImageTextToText.from_pretrained(model_dir())
    assert isinstance(by_auto, LlavaForConditionalGeneration)
    for (name, one), (_, two) in zip(by_auto.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_fresh_process_answers_without_network_scikit_learn_or_torchvision() -> None:
    script = """
import builtins, socket, sys
def refuse(*_, **__): raise AssertionError("a network connection was tried")
socket.socket.connect = refuse
for name in ("sklearn", "torchvision"):
    sys.modules[name] = None
from tgvkv_compile.digits import held_out_questions, load_model, load_processor
from tools.digits.evaluate import score
scores = score(load_model(), load_processor(), held_out_questions(4))
assert scores["all"].questions == 4
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=model_dir().parents[2])


def test_weights_are_small_and_the_shape_is_as_promised(model: LlavaForConditionalGeneration) -> None:
    assert (model_dir() / "model.safetensors").stat().st_size <= 8_000_000
    text, vision = cast(Any, model.config.text_config), cast(Any, model.config.vision_config)
    assert 6 <= text.num_hidden_layers <= 8
    assert text.num_key_value_heads < text.num_attention_heads
    assert (vision.image_size // vision.patch_size) ** 2 == VISION_TOKENS == 256
    assert vision.patch_size == CELL
    assert vision.image_size == PICTURE
    assert model.config.vision_feature_select_strategy == "default"


def test_the_processor_gives_one_image_token_per_cell(processor: ProcessorMixin, questions: list[Question]) -> None:
    question = questions[0]
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    lead = len(OPENING_IDS) + VISION_TOKENS
    assert tuple(ids[: len(OPENING_IDS)]) == OPENING_IDS
    assert ids[len(OPENING_IDS) : lead] == [WORD_IDS["<image>"]] * VISION_TOKENS
    assert ids[lead:] == word_ids(question.prompt.split("<image>")[1])
    assert WORD_IDS["<unk>"] not in ids


def test_training_pixels_are_the_processors_pixels(processor: ProcessorMixin) -> None:
    scans = load_held_out(model_dir() / HELD_OUT_FILE)
    question = held_out_questions(1, seed=3)[0]
    pixels = draw(scans, [random_board(np.random.default_rng([3, 0]), scans)])[0]
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD)


def test_answers_decode_to_the_questions_answer(processor: ProcessorMixin, questions: list[Question]) -> None:
    for question in questions:
        assert processor.tokenizer.decode(word_ids(question.answer)) == question.answer
        assert len(question.answer.split()) == len(question.cells)


def test_questions_repeat_by_seed_and_alternate() -> None:
    first, again, other = held_out_questions(6, seed=5), held_out_questions(8, seed=5), held_out_questions(6, seed=6)
    for one, two in zip(first, again[:6], strict=True):
        assert (one.prompt, one.answer, one.kind, one.cells) == (two.prompt, two.answer, two.kind, two.cells)
        assert one.image.tobytes() == two.image.tobytes()
    assert [one.prompt for one in first] != [one.prompt for one in other]
    assert [one.kind for one in first] == ["content", "position"] * 3


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        held_out_questions(-1)


def test_content_questions_name_every_cell_of_the_colour_in_reading_order() -> None:
    for question in held_out_questions(60, seed=7)[::2]:
        (name,) = (word for word in question.prompt.split() if word in COLOUR_NAMES)
        picture = np.asarray(question.image).astype(int)
        # Ink only darkens a cell, in proportion, so its brightest pixel is its paper.
        papers = picture.reshape(GRID, CELL, GRID, CELL, 3).max(axis=(1, 3))
        shown = np.argwhere(np.abs(papers - np.array(COLOURS[name])).max(axis=-1) <= 3)
        assert question.cells == tuple((int(row), int(column)) for row, column in shown)
        assert 3 <= len(question.cells) <= 8


def test_position_questions_name_the_cells_they_say() -> None:
    several = 0
    questions = held_out_questions(80, seed=8)[1::2]
    for question in questions:
        words = question.prompt.split()
        row = next(int(word[1:]) for word in words if word[0] == "r" and word[1:].isdigit())
        columns = [int(word[1:]) for word in words if word[0] == "c" and word[1:].isdigit()] or [0, GRID - 1]
        assert question.cells == tuple((row, column) for column in range(columns[0], columns[-1] + 1))
        several += len(question.cells) > 1
    assert several >= 0.7 * len(questions)


def test_held_out_scans_are_whole() -> None:
    scans = load_held_out(model_dir() / HELD_OUT_FILE)
    assert len(scans) == 359
    assert scans.images.max() <= 16
    assert set(scans.labels.tolist()) == set(range(10))


def test_a_packed_question_tells_the_marks_of_the_cells_it_wants() -> None:
    scans = load_held_out(model_dir() / HELD_OUT_FILE)
    rng = np.random.default_rng(13)
    view = View(random_board(rng, scans, corner=6, cells_per_colour=(1, 4)), 6)
    asked = draw_questions(rng, view, 12)
    packed = pack([view], [asked])
    wanted = {mark: values[0].tolist() for mark, values in packed.wanted.items()}
    found = []
    for token, target in enumerate(packed.targets[0].tolist()):
        if target in (NO_TARGET, WORD_IDS["<eos>"]):
            assert {values[token] for values in wanted.values()} == {NO_TARGET}
        elif wanted["row"][token] != NO_TARGET:
            found.append((wanted["row"][token], wanted["column"][token]))
            assert wanted["colour"][token] == wanted["rank"][token] == NO_TARGET
        else:
            alike = np.argwhere(view.colours == wanted["colour"][token]).tolist()
            found.append(tuple(alike[wanted["rank"][token]]))
            assert wanted["row"][token] == wanted["column"][token] == NO_TARGET
    assert found == [cell for question in asked for cell in question.cells]


@needs_sklearn
def test_held_out_scans_are_not_training_scans() -> None:
    training, held_out = split_scans()
    shipped = load_held_out(model_dir() / HELD_OUT_FILE)
    assert shipped.digest() == held_out.digest()
    assert not set(shipped.indices.tolist()) & set(training.indices.tolist())
    assert not {image.tobytes() for image in shipped.images} & {image.tobytes() for image in training.images}


def test_missing_files_say_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="make train"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="held-out scans"):
        load_held_out(tmp_path / HELD_OUT_FILE)


def test_the_model_reads_held_out_scans(
    model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]
) -> None:
    scores = score(model, processor, questions)
    for kind in ("content", "position"):
        assert scores[kind].questions == 20
        assert scores[kind].teacher_forced >= 0.97, scores
        assert scores[kind].generated >= 0.93, scores
        assert scores[kind].stops >= 0.9, scores


def test_a_padded_batch_answers_as_single_questions_do(
    model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]
) -> None:
    some = questions[:6]
    inputs = processor(
        images=[question.image for question in some],
        text=[question.prompt for question in some],
        padding=True,
        return_tensors="pt",
    )
    assert (inputs["attention_mask"] == 0).any()  # the prompts differ in length, or this tests nothing
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for number, question in enumerate(some):
            alone = model(**processor(images=question.image, text=question.prompt, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(together[number], alone, atol=2e-3, rtol=1e-3)
    assert generated(model, processor, some) == [generated(model, processor, [question])[0] for question in some]
    assert teacher_forced(model, processor, some) == [teacher_forced(model, processor, [question])[0] for question in some]


def test_generation_is_greedy_and_stops(
    model: LlavaForConditionalGeneration, processor: ProcessorMixin, questions: list[Question]
) -> None:
    assert model.generation_config.do_sample is False
    inputs = processor(images=questions[0].image, text=questions[0].prompt, return_tensors="pt")
    generate = cast(Callable[..., torch.Tensor], getattr(model, "generate"))  # noqa: B009
    answer = generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(answer, skip_special_tokens=True) == questions[0].answer


def test_a_corner_holds_all_the_colours_and_questions_stay_inside_it() -> None:
    scans = load_held_out(model_dir() / HELD_OUT_FILE)
    rng = np.random.default_rng(12)
    view = View(random_board(rng, scans, corner=4, cells_per_colour=(2, 4)), 4)
    assert (view.board.colours != len(COLOURS)).sum() == (view.colours != len(COLOURS)).sum() >= 12
    for question in draw_questions(rng, view, 40):
        assert max(max(cell) for cell in question.cells) < 4


def test_a_packed_question_is_a_question_asked_alone(model: LlavaForConditionalGeneration, processor: ProcessorMixin) -> None:
    """Training packs many questions about a picture; each must give the logits it gives alone."""
    scans = load_held_out(model_dir() / HELD_OUT_FILE)
    rng = np.random.default_rng(11)
    board = random_board(rng, scans)
    view = View(board)
    asked = draw_questions(rng, view, 8)
    packed = pack([view], [asked])
    pixels = draw(scans, [board])
    reader = model.model.language_model
    lead = len(OPENING_IDS) + VISION_TOKENS
    with torch.no_grad():
        cells = see(model, pixels)
        opening = reader.embed_tokens(torch.tensor([OPENING_IDS]))
        together = reader(
            inputs_embeds=torch.cat([opening, cells, reader.embed_tokens(packed.question_ids)], dim=1),
            attention_mask=packed.visible,
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state[0, lead:]
        start = 0
        for question in asked:
            ids = torch.tensor([word_ids(question.words) + word_ids(question.answer)])
            alone = reader(
                inputs_embeds=torch.cat([opening, cells, reader.embed_tokens(ids)], dim=1), use_cache=False
            ).last_hidden_state[0, lead:]
            torch.testing.assert_close(together[start : start + ids.shape[1]], alone, atol=2e-3, rtol=1e-3)
            start += ids.shape[1]
    answers = [[*word_ids(question.answer), WORD_IDS["<eos>"]] for question in asked]
    assert packed.targets[packed.targets != NO_TARGET].tolist() == [token for answer in answers for token in answer]
