"""Trains the small model: `python -m tools.digits.train [--seed 0] [--minutes 58] [--out FOLDER]`.

Needs scikit-learn, for the training scans. Writes everything that `load_model` and `load_processor` read. The recipe
counts steps, not time, so that it is the same on a slower machine; `--minutes` only ends it early, and gently.
`--resume` goes on, on the whole picture, from the folder of a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from tgvkv_compile.digits.loading import load_model
from tgvkv_compile.digits.scans import HELD_OUT_FILE
from tools.digits.architecture import build_model
from tools.digits.processor_files import save_processor
from tools.digits.split_scans import save_held_out, split_scans
from tools.digits.train_counter import build_rank_head, train_counter
from tools.digits.train_eyes import train_eyes
from tools.digits.train_reader import LESSONS, train_reader

EYES_STEPS = 1000
COUNTER_STEPS = 1500
FULL_STEPS = 2000
ASSETS = Path(__file__).parent / "assets"


def train(seed: int, minutes: float, out: Path, resume: Path | None = None) -> None:
    """Trains the model and writes its folder.

    Args:
        seed: Fixes the initial weights, the pictures, the questions and the augmentation.
        minutes: Time limit; on two idle cores the recipe needs less.
        out: The folder to write; made if missing. From the first minutes on it holds a model that loads.
        resume: A folder that an interrupted run wrote: goes on from its weights, on the whole picture.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    jitter = torch.Generator().manual_seed(seed)
    training, held_out = split_scans()
    model = build_model() if resume is None else load_model(resume)
    out.mkdir(parents=True, exist_ok=True)
    save_processor(out)
    save_held_out(held_out, training, out / HELD_OUT_FILE)
    begun, begun_cpu = time.monotonic(), time.process_time()
    eyes = None
    if resume is None:
        eyes = train_eyes(model, training, steps=EYES_STEPS, rng=rng, jitter=jitter)
        _save(model, out)
    rank_head = build_rank_head()
    counter = None
    if resume is None:
        counter = train_counter(model, rank_head, training, steps=COUNTER_STEPS, rng=rng, jitter=jitter)
        _save(model, out)
    reader = train_reader(
        model,
        rank_head,
        training,
        full_steps=FULL_STEPS,
        deadline=begun + 60 * minutes,
        rng=rng,
        jitter=jitter,
        save=lambda: _save(model, out),
        first_lesson=0 if resume is None else len(LESSONS) - 1,
    )
    _save(model, out)
    record = {
        "seed": seed,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "cpu_minutes": round((time.process_time() - begun_cpu) / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "eyes": None if eyes is None else asdict(eyes),
        "counter_accuracy": counter,
        "reader_steps": reader.steps,
        "reader_lessons": reader.lessons_left,
        "reader_steps_on_the_whole_picture": reader.steps_in_lesson,
        "reader_accuracy_on_training_scans": reader.accuracy,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)


def _save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Writes weights and configurations; readable by everyone, which `save_pretrained` does not make them."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.digits.train", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, pictures and questions (default: 0)")
    parser.add_argument("--minutes", type=float, default=58.0, help="time limit (default: 58)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: the package's assets)")
    parser.add_argument("--resume", type=Path, help="go on from this folder, on the whole picture")
    parser.add_argument("--threads", type=int, default=2, help="fewer are faster on busy cores (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.seed, options.minutes, options.out, options.resume)


if __name__ == "__main__":
    main()
