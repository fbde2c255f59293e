"""What every test starts from: one thread, no network, fixed seeds, and nothing left over from the test before."""

import gc
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

# Models are so small that a second thread only waits; tests run side by side instead.
torch.set_num_threads(1)

# Torch renders every graph, guard and stack for `TORCH_TRACE` as long as this logger has a handler, of whatever kind. Its own
# leaves with the first message, but pytest gives one to every logger that does not propagate.
TRACE = logging.getLogger("torch.__trace")
TRACE.handlers, TRACE.propagate = [], True

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
def no_cache_of_shapes() -> None:
    """Dynamo's cache of what operators do to shapes takes a fifth of the time of compiling where sizes are symbols.

    Processes that tests start have it.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.fake_tensor_cache_enabled = False


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again, nor for new garbage as often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
