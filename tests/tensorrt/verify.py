"""Builds TensorRT engines of the recorded models and compares their tokens with the record: `make verify-tensorrt`.

For a machine with an NVIDIA GPU, TensorRT and Torch-TensorRT; it has not run on one yet. Both ways are taken: Torch-TensorRT,
and trtexec from the ONNX files, where trtexec is found.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.recorded import MARGIN, case_name, cases, load_inputs, load_model
from tgvkv_compile.errors import TgvkvError
from tgvkv_compile.export import TensorRTGenerator, export_onnx, export_tensorrt, trtexec_commands

BUDGETS = (0.05, 0.2, 0.5, 0.9)
NEW = 40


def main() -> int:
    """Prints a line per case and way; 0 if all tokens are those of the record."""
    failed = 0
    for case in cases():
        if case["budget"] not in BUDGETS:
            continue
        model, inputs = load_model(case["case"]), load_inputs(case["case"])
        for way in ("torch_tensorrt", "trtexec"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    said, good = _compare(case, _tokens(way, model, inputs, case["budget"], Path(folder)))
                except (TgvkvError, subprocess.CalledProcessError) as error:
                    said, good = f"failed: {error}", False
            failed += not good
            sys.stdout.write(f"{case_name(case):18s} {way:15s} {said}\n")
    sys.stdout.write(f"{failed} failed\n" if failed else "all tokens are those of the record\n")
    return int(failed > 0)


def _tokens(way: str, model: Any, inputs: dict[str, Tensor], budget: float, folder: Path) -> list[int] | None:
    """The answer; None where the way cannot be taken here."""
    if way == "torch_tensorrt":
        on_gpu = {name: value.cuda() for name, value in inputs.items()}
        export_tensorrt(model.cuda(), on_gpu, folder, budget, NEW)
    else:
        if shutil.which("trtexec") is None:
            return None
        export_onnx(model.cpu(), inputs, folder, budget, NEW)
        for command in trtexec_commands(folder):
            subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    sequences = TensorRTGenerator(folder).generate(**inputs, max_new_tokens=NEW)
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


def _compare(case: dict[str, Any], found: list[int] | None) -> tuple[str, bool]:
    if found is None:
        return "not taken: trtexec is not on the PATH", True
    expected = case["tokens"][:NEW]
    same = next((step for step, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
    if same == len(expected):
        return f"{same} of {len(expected)} tokens are the same", True
    close = " (the record's best two logits are close somewhere)" if case["min_margin"] < MARGIN else ""
    return f"differs from token {same} on{close}: {found[same]} for {expected[same]}", False


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("verify-tensorrt needs an NVIDIA GPU, TensorRT and torch-tensorrt: torch finds no CUDA device")
    sys.exit(main())
