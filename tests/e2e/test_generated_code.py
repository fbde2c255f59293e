"""What Inductor makes of a decode step: the arenas are handed from piece to piece and copied nowhere."""

import re

import pytest
from torch._inductor.utils import run_and_get_code

from tests.support.models import Shape, make_inputs, make_model
from tests.support.running import run
from tgvkv_compile import tgvkv_backend
from tgvkv_compile.ops.state import CompactState

LAYERS = 3
CALL = re.compile(r"torch\.ops\.tgvkv\.decode_step\.default\((.*)\)$", re.MULTILINE)
INPUT = re.compile(r"\barg\d+_1\b")


@pytest.mark.slow
def test_the_code_of_a_decode_step_holds_no_copy_of_an_arena() -> None:
    model = make_model(Shape(layers=LAYERS))
    model.compile(backend=tgvkv_backend(0.3))
    _, codes = run_and_get_code(lambda: run(model, make_inputs(((5, 9), (3, 2, 6))), 3))
    pieces = [code for code in codes if CALL.search(code)]
    assert len(pieces) == 2  # a layer, and the last one with what comes after it
    for code in pieces:
        body = code[code.index("def call(self, args):") : code.index("def get_args(")]
        (call,) = CALL.findall(body)
        check(body, INPUT.findall(call))


def check(body: str, state: list[str]) -> None:
    """The state that the op updates in place is the piece's own input, and nothing else of the code reads the arenas."""
    assert len(state) >= len(CompactState._fields)
    for arena in state[-len(CompactState._fields) :][:2]:
        lines = [line.strip() for line in body.splitlines() if re.search(rf"\b{arena}\b", line)]
        others = [
            line
            for line in lines
            if not CALL.search(line) and not re.match(r"(del |assert_size_stride\(|arg\d+_1, |\w+_size = )", line)
        ]
        assert not others, others
