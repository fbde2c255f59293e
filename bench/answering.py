"""One process of `bench.answers`: loads a model, answers requests one after the other, says when each answer was there.

The parent starts it; it takes a `Task` as JSON on stdin and leaves `Answers` as JSON in the last line of stdout.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import torch

import tgvkv_compile
from bench import torch_internals
from bench.contenders import Compiler
from bench.models import make_whole_model
from bench.photos import requests
from bench.presets import Preset


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process is to do.

    Attributes:
        way: `"hf-eager"`, `"inductor-full"` or `"tgvkv"`, as in `bench.contenders`.
        preset: Of the model.
        pictures: Requests, each about pictures of another size.
        batch: Samples of a request.
        new_tokens: Of an answer.
        budget: Fraction of KV that `tgvkv` keeps.
        compiler: What graphs are lowered to.
        threads: torch's.
    """

    way: str
    preset: Preset
    pictures: int
    batch: int
    new_tokens: int
    budget: float
    compiler: Compiler
    threads: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a process did. Seconds are since it was started, imports included.

    Attributes:
        ready_s: When the model was loaded and the first request could come.
        answers_s: When each answer was there.
        graphs: How many graphs dynamo handed to the backend.
        kinds: `tgvkv`: how many of each kind.
    """

    ready_s: float
    answers_s: list[float]
    graphs: int
    kinds: dict[str, int] | None


def answer(task: Task, started: float) -> Answers:
    """Answers all requests of a task in this process.

    Args:
        task: What to do.
        started: `time.monotonic()` when the process was started: one clock for all processes of a machine.
    """
    torch.set_num_threads(task.threads)
    model = make_whole_model(task.preset)
    kinds = _compile(model, task)
    asked = requests(task.preset, task.pictures, task.batch)
    ready = time.monotonic() - started
    times = []
    for inputs in asked:
        output = model.generate(**inputs, max_new_tokens=task.new_tokens, do_sample=False)
        said = output[:, inputs["input_ids"].shape[1] :].tolist()
        times.append(time.monotonic() - started)
        assert len(said) == task.batch and len(said[0]) == task.new_tokens
    return Answers(ready, times, torch_internals.graphs(), kinds)


def _compile(model: Any, task: Task) -> dict[str, int] | None:
    """Compiles the model in place as its user would; for `tgvkv`, the counts of its backend."""
    if task.way == "inductor-full":
        model.compile(backend=task.compiler)  # "inductor" is the default
    elif task.way == "tgvkv":
        backend = tgvkv_compile.tgvkv_backend(task.budget, lowering=task.compiler)
        model.compile(backend=backend)
        return backend.graphs
    return None


def read_task(text: str) -> tuple[Task, float]:
    """What `written_task` wrote."""
    given = json.loads(text)
    started = given.pop("started")
    return Task(**{**given, "preset": Preset(**given["preset"])}), started


def written_task(task: Task, started: float) -> str:
    """For stdin of the process."""
    return json.dumps({**dataclasses.asdict(task), "started": started})


if __name__ == "__main__":
    result = answer(*read_task(sys.stdin.read()))
    sys.stdout.write(f"\n{json.dumps(dataclasses.asdict(result))}\n")
