"""Holding a compiled run against the reference."""

import torch

from tests.support.reference import ReferenceTrace
from tests.support.running import Trace

TOLERANCE = 1e-4
MARGIN = 1e-3


def assert_same_run(found: Trace, expected: ReferenceTrace) -> None:
    """A compiled run does what the reference does, call by call; both were fed the same tokens.

    A sample is compared up to the call in which float noise could have changed what is evicted.
    """
    assert len(found.logits) == len(expected.logits)
    for call, (logits, wanted) in enumerate(zip(found.logits, expected.logits, strict=True)):
        for sample, fragile in enumerate(expected.fragile):
            where = f"call {call}, sample {sample}"
            if fragile is not None and call > fragile:
                continue
            torch.testing.assert_close(
                logits[sample], wanted[sample], atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, w=where: f"{w}: {text}"
            )
            best = wanted[sample].topk(2).values
            if float(best[0] - best[1]) > MARGIN:
                assert found.tokens[call][sample] == expected.tokens[call][sample], where
            if fragile is None or call < fragile:
                assert found.kept[call][sample] == expected.kept[call][sample], where


def assert_same_traces(found: Trace, expected: Trace, *, samples: list[int] | None = None) -> None:
    """Two compiled runs that were fed the same tokens agree up to float noise.

    Args:
        found: The one run.
        expected: The other.
        samples: `found`'s sample `i` is `expected`'s sample `samples[i]`; the same by default.
    """
    chosen = samples if samples is not None else list(range(len(expected.tokens[0])))
    for call, (logits, wanted) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(logits, wanted[chosen], atol=TOLERANCE, rtol=TOLERANCE)
        assert found.kept[call] == [expected.kept[call][sample] for sample in chosen], f"call {call}"
