"""Contenders that each run in a process of their own: started alike, interleaved, with caches in folders of their own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.answering import Answers, Task, written_task
from bench.errors import BenchError
from bench.measure import say

WARM = "-warm"
ORDER = ("hf-eager", "inductor-full", f"inductor-full{WARM}", "tgvkv", f"tgvkv{WARM}")
"""All there are. A warm one is a new process that finds the cache folder of the cold one before it."""

Runs = dict[str, list[Answers]]
"""Per contender, its rounds."""


def check_names(names: Sequence[str]) -> None:
    """Raises `BenchError` where a contender is unknown, named twice, or warm without the cold one that it comes after."""
    for name in names:
        if name not in ORDER:
            raise BenchError(f"no contender {name!r}; there are {', '.join(ORDER)}")
        cold = name.removesuffix(WARM)
        if cold not in names:
            raise BenchError(f"contender {name!r} starts with the caches that {cold!r} leaves; name {cold!r}, too")
    if len(set(names)) < len(names) or not names:
        raise BenchError(f"contenders {','.join(names)!r}: name each one once, and at least one")


def in_turns(
    axis: str,
    tasks: Mapping[int, Task],
    names: Sequence[str],
    rounds: int,
    limit_s: float,
    after_round: Callable[[dict[int, Runs]], None],
) -> dict[int, Runs]:
    """Runs every contender on every task, `rounds` times; who comes first changes.

    Args:
        axis: What the tasks differ in.
        tasks: By its value; the contender is filled in here.
        names: Of the contenders; see `check_names`.
        rounds: How many.
        limit_s: Seconds that a process may take.
        after_round: Is handed all that was measured so far: a long run that dies has written what it had.

    Raises:
        BenchError: A process failed or took too long.
    """
    ways = list(dict.fromkeys(name.removesuffix(WARM) for name in names))
    runs: dict[int, Runs] = {key: {name: [] for name in names} for key in tasks}
    for number in range(rounds):
        turn = number % len(ways)
        for key, task in tasks.items():
            for way in ways[turn:] + ways[:turn]:
                # Processes that were stopped may still be writing.
                with tempfile.TemporaryDirectory(prefix="tgvkv-bench-", ignore_cleanup_errors=True) as cache:
                    for name in (way, f"{way}{WARM}"):
                        if name in names:
                            say(f"round {number + 1} of {rounds}, {axis} {key}: {name}")
                            here = dataclasses.replace(task, way=way)
                            runs[key][name].append(in_a_process(here, Path(cache), limit_s))
        after_round(runs)
    return runs


def in_a_process(task: Task, cache: Path, limit_s: float) -> Answers:
    """Does a task in a new process.

    Args:
        task: What to do.
        cache: Where compilers keep what they made; what they find there they do not make again.
        limit_s: Seconds that it may take.

    Raises:
        BenchError: It failed or took too long.
    """
    environment = {
        **os.environ,
        **{"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")},
        **{"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    }
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.answering"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        written, told = process.communicate(written_task(task, started), timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{task.way}: not done after {limit_s:g} seconds; give it more with --limit") from None
    finally:
        _stop(process)
    if process.returncode != 0:
        last = (told.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"{task.way}: its process ended with code {process.returncode}: {last}")
    return Answers(**json.loads(written.strip().splitlines()[-1]))


def _stop(process: "subprocess.Popen[Any]") -> None:
    """Ends the process, and those that it started: Inductor's workers outlive a parent that is killed."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
