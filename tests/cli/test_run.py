"""`tgvkv run` and `tgvkv explain` on the embedded model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.command import succeeded, tgvkv
from tgvkv_compile.backend.request import with_image_tokens
from tgvkv_compile.cli.inputs import Loaded, build_inputs
from tgvkv_compile.digits import Question, held_out_questions, load_model, load_processor, model_dir
from tgvkv_compile.errors import ConfigError


@pytest.fixture(scope="module")
def question() -> Question:
    return held_out_questions(3)[2]


@pytest.fixture(scope="module")
def picture(question: Question, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "digits.png"
    question.image.save(path)
    return path


def uncompiled(question: Question) -> str:
    model: Any = load_model()
    processor: Any = load_processor()
    inputs = processor(images=[question.image], text=[question.prompt], return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    return str(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def run(question: Question, picture: Path, *more: object) -> list[str]:
    asked = ("run", "--model", model_dir(), "--image", picture, "--prompt", question.prompt, "--max-new-tokens", 16)
    return succeeded(tgvkv(*asked, *more, cwd=picture.parent)).out.splitlines()


def test_full_budget_answers_as_the_uncompiled_model(question: Question, picture: Path) -> None:
    lines = run(question, picture, "--budget", "1.0", "--lowering", "eager")
    assert lines[0].strip() == uncompiled(question)
    assert "KV cache: 6 layers" in "\n".join(lines)


def test_a_small_budget_is_reported(question: Question, picture: Path) -> None:
    lines = run(question, picture, "--budget", "0.1", "--decode", "keep", "--lowering", "eager")
    (kept,) = [line.split(":")[1].split() for line in lines if "kept per layer" in line]
    assert len(kept) == 6
    assert 6 * 4 <= sum(map(int, kept)) <= 6 * (0.1 * 265 + 16 + 6)
    assert any("free for growth" in line for line in lines)


@pytest.mark.slow
def test_inductor(question: Question, picture: Path) -> None:
    assert run(question, picture, "--budget", "1.0")[0].strip() == uncompiled(question)


def test_explain_needs_no_picture(tmp_path: Path) -> None:
    out = succeeded(tgvkv("explain", "--model", model_dir(), "--budget", "0.1", cwd=tmp_path)).out
    assert "LlavaForConditionalGeneration" in out
    assert "compress the KV of 6 layers" in out


def test_missing_image_tokens_are_put_in_front() -> None:
    assert with_image_tokens("what ?", "<image>", 2) == "<image> <image> what ?"
    assert with_image_tokens("this <image> what ?", "<image>", 1) == "this <image> what ?"
    with pytest.raises(ConfigError, match="2 <image> for 1 pictures"):
        with_image_tokens("<image> <image>", "<image>", 1)


def test_a_chat_template_is_applied(question: Question) -> None:
    processor: Any = load_processor()
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ 'picture : <image>' if part['type'] == 'image' else ' ' + part['text'] }}"
        "{% endfor %}{% if add_generation_prompt %} ? answer :{% endif %}"
    )
    loaded = Loaded(load_model(), processor)
    words = question.prompt.split("<image>")[1].removesuffix("? answer :").strip()
    inputs = build_inputs(loaded, [question.image], words)
    expected = processor(images=[question.image], text=[question.prompt], return_tensors="pt")
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
