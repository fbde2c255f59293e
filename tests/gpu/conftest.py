import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    """Skips where there is no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
