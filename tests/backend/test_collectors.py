"""What one thread collects of its picture stays its own while another thread compiles."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tests.support.models import make_inputs, make_model
from tgvkv_compile import tgvkv_backend


def test_two_pictures_while_a_third_thread_compiles() -> None:
    """The first one's tower waits in the middle until the second one's is done; all the while something is compiled."""
    torch._dynamo.reset()
    model, inputs = make_model(), make_inputs(((5, 9),))
    compiling, encoded, half_way = threading.Event(), threading.Event(), threading.Event()

    def slow_backend(gm: Any, _: Any) -> Any:
        compiling.set()
        assert encoded.wait(60)
        return gm

    def wait_in_the_first(*_: Any) -> None:
        if not half_way.is_set():
            half_way.set()
            assert second.result(60) is not None

    def features() -> Tensor:
        with torch.no_grad():
            return torch.cat(tuple(model.get_image_features(inputs["pixel_values"]).pooler_output))

    wanted = features()
    model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
    layer = model.model.vision_tower.encoder.layers[0]
    with ThreadPoolExecutor(3) as pool:
        pool.submit(torch.compile(torch.sin, backend=slow_backend), torch.ones(2))
        assert compiling.wait(60)
        started = threading.Event()
        second = pool.submit(lambda: started.wait(60) and features())
        layer.register_forward_pre_hook(wait_in_the_first)
        first = pool.submit(features)
        assert half_way.wait(60)
        started.set()
        try:
            torch.testing.assert_close(first.result(60), wanted)
            torch.testing.assert_close(second.result(60), wanted)
        finally:
            encoded.set()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
