"""What the backend needs of dynamo: flags, and how to read where dynamo broke a graph."""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tgvkv_compile.backend.chunk_loops import keep_chunk_loops
from tgvkv_compile.backend.collectors import collect_by_thread
from tgvkv_compile.backend.cut import cut_models
from tgvkv_compile.backend.sliding_windows import hand_windows_back
from tgvkv_compile.private import dynamo_config, keep_mutations_after_subgraphs, set_for_all_threads, symbolic_shapes_config

log = logging.getLogger("tgvkv_compile")

RECOMPILE_LIMIT = 256


def flags() -> dict[str, Any]:
    """Dynamo's flags with which a VLM's decoder is one graph and eager fallback is an error.

    - `capture_scalar_outputs`, `capture_dynamic_output_shape_ops`: transformers' token count check (`.item()`) and
      deepstack's boolean indexing break the graph otherwise.
    - `recompile_limit` and `accumulated_recompile_limit`, raised to at least 256: all models of a process share one
      counter, and past the limit dynamo runs eager.
    - `specialize_float`: a second model with another head dim would be traced with the scale of its attention as an input.
    - `fail_on_recompile_limit_hit`: reaching the limit raises instead of running eager, silently and uncompressed.
    """
    config = dynamo_config
    return {
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "specialize_float": True,
        "recompile_limit": max(config.recompile_limit, RECOMPILE_LIMIT),
        "accumulated_recompile_limit": max(config.accumulated_recompile_limit, RECOMPILE_LIMIT),
        "fail_on_recompile_limit_hit": True,
    }


def symbolic_flags() -> dict[str, Any]:
    """Flags of symbolic shapes that the same takes on older releases.

    - `soft_pending_unbacked_not_found_error`, before torch 2.13: dynamo puts the token count check into the graph whole
      there (`torch._check_tensor_all`) and takes the symbol that its fake run leaves behind for an error.
    """
    return {} if torch.__version__ >= "2.13" else {"soft_pending_unbacked_not_found_error": True}


def _all_flags() -> tuple[tuple[Any, dict[str, Any]], ...]:
    return (dynamo_config, flags()), (symbolic_shapes_config, symbolic_flags())


def configure() -> None:
    """Sets the flags, process-wide: dynamo gives a backend no way to scope them to a call.

    What is assigned to a flag is seen by the thread that did it only, and a server answers in others.
    """
    for config, chosen in _all_flags():
        for name, value in chosen.items():
            setattr(config, name, value)
            set_for_all_threads(config, name, value)
    _adjust()


def _adjust() -> None:
    """What no flag does. It stays: dynamo knows no way back, and it changes no result."""
    keep_mutations_after_subgraphs()
    cut_models()
    hand_windows_back()
    keep_chunk_loops()
    collect_by_thread()
    _never_warn()
    masks = sys.modules.get("transformers.masking_utils")  # where it is not loaded, there is no model to compile yet
    fast_all = getattr(masks, "fast_all", None)
    if fast_all is not None:
        _always_mask(fast_all)


@contextlib.contextmanager
def configured() -> Iterator[None]:
    """The flags are set within, and as they were afterwards."""
    _adjust()
    with contextlib.ExitStack() as stack:
        for config, chosen in _all_flags():
            if chosen:
                stack.enter_context(config.patch(chosen))
        yield


@functools.cache
def _never_warn() -> None:
    """Flex attention's `create_block_mask` calls `warnings.warn`, which breaks the graph: traced code does not warn.

    The flag `ignore_logging_functions` says the same, but torch 2.11 cannot log its flags while a builtin is among them.
    """
    torch.compiler.substitute_in_graph(warnings.warn, skip_signature_check=True)(lambda *_, **__: None)


@functools.cache
def _always_mask(fast_all: Callable[[torch.Tensor], Any]) -> None:
    """Flex attention's mask leaves padding out of account where `fast_all(mask)`: a branch on data, which breaks the graph.

    Traced code takes the other branch, which is right for every mask. Eager code is as it was.
    """

    @torch.compiler.substitute_in_graph(fast_all)
    def traced(tensor: torch.Tensor) -> bool:
        return False


def graph_break(gm: GraphModule) -> Any | None:
    """Dynamo's `GraphCompileReason` where the graph ends at a graph break, None where it ends with its frame."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and getattr(reason, "graph_break", False) else None


def break_place(reason: Any) -> str:
    """`file:line: why` of a graph break."""
    frame = reason.user_stack[-1] if reason.user_stack else None
    at = f"{frame.filename}:{frame.lineno}" if frame is not None else "(unknown place)"
    return f"{at}: {str(reason.reason).strip().splitlines()[0]}"


def breaks_inside(reason: Any, node: Node) -> bool:
    """Whether a graph break is inside the decoder that the attention node `node` belongs to.

    The break's stack and the node's are compared from the outermost frame. The frame where they part is the innermost
    one that holds both; the decoder is split if that frame is the one that loops over the layers, or deeper.
    """
    site = _frames(node.meta.get("stack_trace") or "")
    broken = [(frame.filename, frame.lineno, frame.name) for frame in reason.user_stack]
    shared = 0
    while shared < min(len(site), len(broken)) and site[shared] == broken[shared]:
        shared += 1
    loop = _loop_frame(node, site)
    return loop is None or shared >= loop


def _loop_frame(node: Node, frames: list[tuple[str, int, str]]) -> int | None:
    """Index of the frame that calls the decoder layers: the `forward` of the module that holds `layers.<n>`."""
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    depth = next((index for index, path in enumerate(paths) if _names_layer(path)), None)
    forwards = [index for index, (_, _, name) in enumerate(frames) if name == "forward"]
    if depth is None or not 1 <= depth <= len(forwards):
        return None
    return forwards[depth - 1]


def _names_layer(path: str) -> bool:
    last = path.replace("]", "").replace("[", ".").rstrip(".").rsplit(".", 1)[-1].strip("'\"")
    return last.isdigit()


def _frames(trace: str) -> list[tuple[str, int, str]]:
    frames = []
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith('File "'):
            file, _, rest = line.removeprefix('File "').partition('", line ')
            number, _, name = rest.partition(", in ")
            frames.append((file, int(number), name))
    return frames
