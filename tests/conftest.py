"""What every test starts from: one thread, no network, fixed seeds, and nothing left over from the test before."""

import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

# Models are so small that a second thread only waits; tests run side by side instead.
torch.set_num_threads(1)

# The same examples in every run, so that a failure is the change's. HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "search", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forgets compiled code and dynamo's counters before each test, and seeds torch.

    Costs nothing until something has imported dynamo.
    """
    torch.manual_seed(0)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def no_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest's log capture makes torch render every graph and guard for `TORCH_TRACE`, which takes a third of the time."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
