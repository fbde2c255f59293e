"""Warm-up, then rounds in which each contender has its turn."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import tgvkv_compile
from bench import torch_internals
from bench.contenders import Contender
from bench.errors import BenchError
from bench.memory import Watch
from bench.models import Prompt, make_prompt, pictures_of, weight_bytes
from bench.presets import Preset
from bench.ratios import spread
from bench.requests import Request

WARM_STEPS = 4
"""Decode steps until all is compiled: the second finds out that lengths vary; CUDA graphs warm up, then record."""
WARM_ROUNDS = 4
"""Most rounds before one in which nothing is compiled."""
ANSWER = 64
"""Tokens of the answer that `tokens_per_s` is for."""

Rounds = dict[str, list[float]]


def conditions(model: Any, preset: Preset) -> dict[str, Any]:
    """What a record says of the prompt, the answer and the model, beside the preset."""
    return {
        "prompt": {"tokens": preset.context, "vision_tokens": pictures_of(preset) * preset.picture_side**2},
        "answer_tokens": ANSWER,
        "weight_bytes": weight_bytes(model),
    }


def measure(contenders: list[Contender], model: Any, preset: Preset) -> dict[str, dict[str, Any]]:
    """Measures all contenders.

    Args:
        contenders: In the order of the rows.
        model: Of the preset.
        preset: What is measured.

    Returns:
        Per contender, its row: medians, and with them `spread` and `rounds` of what was timed, and `compiles_while_timing`.

    Raises:
        BenchError: Something was compiled while it was timed.
    """
    rows: dict[str, dict[str, Any]] = {contender.name: {} for contender in contenders}
    _start_compiler()
    requests = _open(contenders, preset, make_prompt(model, preset, preset.batch), rows)
    decode = _rounds("decode", contenders, lambda one: requests[one.name].decode(preset.steps), preset.rounds, rows)
    for contender in contenders:
        _close(requests.pop(contender.name), rows[contender.name])
    prompt = make_prompt(model, preset, preset.prefill_batch)
    with_prefill = [contender for contender in contenders if contender.prefill is not None]
    for contender in with_prefill:
        _warm_prefill(contender, preset, prompt, rows[contender.name])
    prefill = _rounds("prefill", with_prefill, lambda one: _prefill(one, preset, prompt), preset.prefill_rounds, rows)
    for name, row in rows.items():
        _summarise(row, preset, decode[name], prefill.get(name))
    return rows


def _start_compiler() -> None:
    """Inductor's own imports and workers are nobody's compile time."""
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8))


def _open(contenders: list[Contender], preset: Preset, prompt: Prompt, rows: dict[str, dict[str, Any]]) -> dict[str, Request]:
    """Two requests each: one that compiles, and one that is not yet over, whose decode is timed."""
    requests = {}
    for contender in contenders:
        say(f"{contender.name}: compiles")
        cold, row = 0.0, rows[contender.name]
        if contender.compiled:
            with torch_internals.cold():
                cold, _, _ = _watched(contender, preset, prompt)
        warm, request, row["decode_peak_bytes"] = _watched(contender, preset, prompt)
        row["compile_s"] = max(0.0, cold - warm)
        row["batch_prefill_ms"] = None if request.prefill_s is None else request.prefill_s * 1e3
        requests[contender.name] = request
    return requests


def _watched(contender: Contender, preset: Preset, prompt: Prompt) -> tuple[float, Request, int]:
    """Prefill and some steps: seconds, the request, and the peak of the steps, what the cache holds included."""
    gc.collect()
    with Watch(preset.device) as watch:
        begun = time.perf_counter()
        request = Request(contender, preset, prompt, _room(preset))
        with watch.part("decode"):
            request.decode(WARM_STEPS)
        seconds = time.perf_counter() - begun
    return seconds, request, watch.peaks["decode"] + _held_before(contender, request)


def _held_before(contender: Contender, request: Request) -> int:
    """Bytes of a cache that was there before the request."""
    return tgvkv_compile.inspect_cache(request.cache).physical_bytes if contender.keeps_cache else 0


def _room(preset: Preset) -> int:
    return WARM_STEPS + (preset.rounds + WARM_ROUNDS) * preset.steps


def _rounds(
    what: str,
    contenders: list[Contender],
    run: Callable[[Contender], float],
    count: int,
    rows: dict[str, dict[str, Any]],
) -> Rounds:
    """Seconds per round. Rounds before the first that compiles nothing are warm-up; later ones may compile nothing."""
    for _ in range(WARM_ROUNDS):
        before = torch_internals.compiles()
        for contender in contenders:
            run(contender)
        if torch_internals.compiles() == before:
            break
    times: Rounds = {contender.name: [] for contender in contenders}
    for number in range(count):
        say(f"{what}: round {number + 1} of {count}")
        turn = number % len(contenders)  # nobody always comes behind the same one
        for contender in contenders[turn:] + contenders[:turn]:
            before = torch_internals.compiles()
            times[contender.name].append(run(contender))
            compiled = torch_internals.compiles() - before
            row = rows[contender.name]
            row["compiles_while_timing"] = row.get("compiles_while_timing", 0) + compiled
            if compiled:
                raise BenchError(f"{contender.name} compiled in timed round {number + 1} of {what}: warm it up for longer")
    return times


def _close(request: Request, row: dict[str, Any]) -> None:
    report = tgvkv_compile.inspect_cache(request.cache)
    row["kv_bytes"], row["kv_reserve_bytes"] = report.physical_bytes, report.reserve_bytes


def _prefill(contender: Contender, preset: Preset, prompt: Prompt) -> float:
    gc.collect()
    seconds = Request(contender, preset, prompt, preset.steps).prefill_s
    assert seconds is not None
    return seconds


def _warm_prefill(contender: Contender, preset: Preset, prompt: Prompt, row: dict[str, Any]) -> None:
    say(f"{contender.name}: prefill")
    _prefill(contender, preset, prompt)  # compiles for this batch size
    with Watch(preset.device) as watch, watch.part("prefill"):
        request = Request(contender, preset, prompt, preset.steps)
    row["prefill_peak_bytes"] = watch.peaks["prefill"] + _held_before(contender, request)


def _summarise(row: dict[str, Any], preset: Preset, decode: list[float], prefill: list[float] | None) -> None:
    row["rounds"] = {"decode_ms": [1e3 * seconds for seconds in decode]}
    if prefill is not None:
        row["rounds"]["prefill_ms"] = [1e3 * seconds for seconds in prefill]
    row["spread"] = {key: spread(values) for key, values in row["rounds"].items()}
    row["decode_ms"] = statistics.median(row["rounds"]["decode_ms"])
    row["prefill_ms"] = None if prefill is None else statistics.median(row["rounds"]["prefill_ms"])
    row.setdefault("prefill_peak_bytes", None)
    whole = row["batch_prefill_ms"]
    row["tokens_per_s"] = None if whole is None else 1e3 * preset.batch * ANSWER / (whole + (ANSWER - 1) * row["decode_ms"])


def say(line: str) -> None:
    """Progress, apart from results."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
