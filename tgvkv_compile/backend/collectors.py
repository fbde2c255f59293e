"""Threads that encode pictures while another one compiles: each collects its own hidden states.

What transformers' vision towers collect lies in a context variable, or in a global one while `torch.compiler.is_compiling()`,
which is true in every thread while one of them compiles: two threads then empty each other's collection, and the features
of a picture are looked for in an empty tuple.
"""

import sys
from typing import Any

import torch

_MODULE = "transformers.utils.output_capturing"
_ASKED = "is_torchdynamo_compiling"
"""What the module asks whether to use the global variable. Checked on transformers 5.17.0 and 5.24.0."""


def collect_by_thread() -> None:
    """Has that module ask whether dynamo traces it, which is what it wants to know; nothing where it is not loaded."""
    module: Any = sys.modules.get(_MODULE)
    if hasattr(module, _ASKED):
        setattr(module, _ASKED, torch.compiler.is_dynamo_compiling)
