"""Vision towers that are left out of the compiled code."""

import copy

import torch

from tests.support.models import Shape, make_inputs, make_model
from tgvkv_compile import leave_vision_uncompiled, tgvkv_backend


def test_the_tower_is_not_in_the_compiled_code_and_the_result_is_the_same() -> None:
    inputs, logits, traced = make_inputs(((5, 9),)), [], []
    for leave in (False, True):
        model = make_model(Shape(layers=2))
        model.model.vision_tower.register_forward_pre_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
        if leave:
            assert leave_vision_uncompiled(model) is model
        model.compile(backend=tgvkv_backend(0.3, lowering="eager"))
        with torch.no_grad():
            logits.append(model(**inputs).logits)
        torch._dynamo.reset()
    assert traced[-1] is False and True in traced[:-1]
    torch.testing.assert_close(*logits)


def test_a_copy_runs_its_own_tower() -> None:
    model = leave_vision_uncompiled(make_model(Shape(layers=1)))
    twin = copy.deepcopy(model)
    assert twin.model.get_image_features.__self__ is twin.model
    assert model.model.get_image_features.__self__ is model.model
