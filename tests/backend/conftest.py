"""A backend sets dynamo's flags for the process; every test here starts with dynamo's own."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def dynamo_flags() -> Iterator[None]:
    with torch._dynamo.config.patch(
        capture_scalar_outputs=False,
        capture_dynamic_output_shape_ops=False,
        recompile_limit=8,
        accumulated_recompile_limit=256,
        fail_on_recompile_limit_hit=False,
    ):
        yield
