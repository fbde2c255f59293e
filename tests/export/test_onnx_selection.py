"""The maths of static shapes on ONNX Runtime: same tokens as the sorting functions, and no operator that TensorRT lacks."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgvkv_compile.ops.eviction.selection import select_tokens
from tgvkv_compile.ops.policy.tgv import text_first
from tgvkv_compile.ops.static.selection import pack_columns, select_by_threshold
from tgvkv_compile.ops.token_types import TokenTypes

CAPACITY = 48


def _token_types(vision: Tensor) -> TokenTypes:
    """Of samples without padding."""
    everything = torch.ones_like(vision)
    positions = torch.arange(vision.shape[1]).expand(vision.shape)
    lengths = everything.to(torch.float32).sum(1).to(torch.int64)
    return TokenTypes(everything, vision, ~vision, positions, lengths)


class _Selection(torch.nn.Module):
    def forward(self, score: Tensor, vision: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = select_by_threshold(score, text_first(_token_types(vision)), _token_types(vision), kept, sink_tokens=4)
        return keep, *pack_columns(keep, CAPACITY)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    call = (torch.rand(2, 40), torch.rand(2, 40) < 0.5, torch.tensor([12, 20]))
    length = {1: torch.export.Dim("length", min=16, max=1 << 15)}
    where = tmp_path_factory.mktemp("selection") / "selection.onnx"
    program = torch.onnx.export(_Selection().eval(), call, dynamo=True, dynamic_shapes=(length, length, None), opset_version=20)
    assert program is not None
    program.save(where)
    return where


@pytest.fixture(scope="module")
def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _check(session: Any, score: Tensor, vision: Tensor, kept: Tensor) -> None:
    feeds = [score.numpy(), vision.numpy(), kept.numpy()]
    names = [entry.name for entry in session.get_inputs()]
    keep, columns, filled = map(torch.from_numpy, session.run(None, dict(zip(names, feeds, strict=True))))
    assert torch.equal(keep, select_tokens(score, text_first(_token_types(vision)), _token_types(vision), kept, sink_tokens=4))
    for sample in range(len(score)):
        assert columns[sample][filled[sample]].tolist() == keep[sample].nonzero()[:, 0].tolist()


@given(st.integers(16, 700), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_it_keeps_what_sorting_keeps(session: Any, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, length, generator=generator) ** torch.randint(1, 60, (2, 1), generator=generator)
    score = (score * 8).round() if seed % 3 == 0 else score  # ties
    vision = torch.rand(2, length, generator=generator) < 0.8
    _check(session, score, vision, torch.randint(5, min(length, CAPACITY) + 1, (2,), generator=generator))


def test_prompts_longer_than_the_longest_sort_of_tensorrt(session: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    score, vision = torch.rand(2, 16384, generator=generator), torch.rand(2, 16384, generator=generator) < 0.999
    _check(session, score, vision, torch.tensor([48, 30]))


def test_the_file_is_valid_and_sorts_nothing(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.input, *inferred.output]
    }
    nodes = list(model.graph.node)
    kinds = {node.op_type for node in nodes}
    assert not model.functions and {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert "CumSum" in kinds and any(kind.startswith("Scatter") for kind in kinds)
    assert not kinds & {"TopK", "NonZero", "Unique", "Compress", "BitCast", "ScatterND", "Loop", "If", "Scan"}
    for node in nodes:
        if node.op_type == "CumSum":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
