"""`python -m tests.fuzz`: random requests against the reference, for a given time or from a given seed."""

import argparse
import dataclasses
import gc
import json
import logging
import platform
import pprint
import random
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.cases import Case, cases
from tests.fuzz.check import Finding, Tally, run_case

REQUESTS = 100
"""Requests per compiled model: compiling takes seconds, a request a fraction of one."""
ENOUGH = 10
"""Findings after which there is nothing to learn from more."""


@dataclasses.dataclass
class _Seen:
    case: Case | None = None
    failing: Case | None = None


def fuzz_seed(number: int, count: int, tally: Tally, *, shrink: bool, lowering: str) -> tuple[str, Case] | None:
    """Draws the case of a seed and runs it; gives a finding with the smallest case that shows it, or None."""
    tries, seen = 0, _Seen()

    @seed(number)
    @settings(
        max_examples=2,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(count))
    def one(case: Case) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            return  # Hypothesis begins with the simplest case, the same one for each seed
        seen.case = seen.case or case
        try:
            run_case(case, tally if tries == 2 else Tally(), lowering=lowering)
        except Finding:
            seen.failing = case
            raise

    try:
        one()
    except Finding as finding:
        assert seen.failing is not None
        return _fewest_requests(str(finding), seen.failing, lowering) if shrink else (str(finding), seen.failing)
    return None


def _fewest_requests(text: str, case: Case, lowering: str) -> tuple[str, Case]:
    """The finding with as few of the requests around the failing one as show it; Hypothesis only makes them simple."""
    for of_length in (lambda count: slice(0, count), lambda count: slice(-count, None)):
        for count in range(1, len(case.requests)):
            fewer = dataclasses.replace(case, requests=case.requests[of_length(count)])
            try:
                run_case(fewer, Tally(), lowering=lowering)
            except Finding as finding:
                text, case = str(finding), fewer
                break
    return text, case


def case_of(number: int, count: int) -> Case:
    """The case of a seed, without running it."""
    drawn: list[Case] = []

    @seed(number)
    @settings(max_examples=2, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    @given(cases(count))
    def one(case: Case) -> None:
        drawn.append(case)

    one()
    return drawn[1]


def resident_mib() -> int:
    """Memory of this process now; its peak where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    """Exit code 0: nothing found; 1: something found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, help="the first seed; those after it follow (default: drawn)")
    parser.add_argument("--seed", type=int, help="run this seed alone, and print its case")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="per compiled model (default: %(default)s)")
    parser.add_argument("--lowering", choices=("eager", "aot_eager", "inductor"), default="eager")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for a smaller case")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the summary here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    if options.seed is not None:
        pprint.pprint(case_of(options.seed, options.requests), width=120)
    first = options.seed if options.seed is not None else options.first_seed
    first = random.SystemRandom().randrange(10**6) if first is None else first
    tally, findings, done = Tally(), [], 0
    begun = time.monotonic()

    def summary() -> dict[str, Any]:
        return {
            **dataclasses.asdict(tally),
            "seconds": round(time.monotonic() - begun, 1),
            "first_seed": first,
            "seeds": done,
            "requests_per_model": options.requests,
            "lowering": options.lowering,
            "resident_mib": resident_mib(),
            "versions": {name: version(name) for name in ("tgvkv-compile", "torch", "transformers", "hypothesis")}
            | {"python": platform.python_version()},
            "findings": findings,
        }

    print(f"fuzzing from seed {first}", flush=True)
    try:
        while True:
            number = first + done
            found = fuzz_seed(number, options.requests, tally, shrink=not options.no_shrink, lowering=options.lowering)
            done += 1
            gc.collect()
            if found is not None:
                text, case = found
                findings.append({"seed": number, "what": text, "case": repr(case)})
                print(f"FOUND with seed {number}: {text}\n{pprint.pformat(case, width=120)}", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(summary(), indent=2) + "\n")
            elapsed = time.monotonic() - begun
            print(
                f"{elapsed:6.0f} s: seed {number}, {tally.cases} cases, {tally.models} models, {len(findings)} findings, "
                f"{resident_mib()} MiB",
                flush=True,
            )
            if options.seed is not None or elapsed >= 60 * options.minutes or len(findings) >= ENOUGH:
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if options.out is not None:
        options.out.write_text(json.dumps(summary(), indent=2) + "\n")
    print(f"{tally.cases} cases on {tally.models} models in {time.monotonic() - begun:.0f} s: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
