"""Vision that one graph merges and another graph's decoder attends to: which tokens it is goes along with the embeddings."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from tgvkv_compile.backend.dynamo import graph_break
from tgvkv_compile.errors import SplitDecoderError, UnsupportedGraphError
from tgvkv_compile.fx.meta import VISION_OF, output_nodes
from tgvkv_compile.ops.graph_masks import vision_positions
from tgvkv_compile.passes.find_merged import attends_to_merged, find_merged
from tgvkv_compile.plan import ModalityMask, Plan


class VisionMarks(threading.local):
    """What is vision among embeddings that are on their way from one graph to the next, in this thread.

    A mark belongs to the tensor and goes when it goes.
    """

    def __init__(self) -> None:
        self._masks: Any = WeakTensorKeyDictionary()
        self._unread: Any = WeakTensorKeyDictionary()

    def put(self, embeds: Tensor, mask: Tensor) -> None:
        """Takes note that `embeds`, `[B, N, hidden]`, are vision where `mask`, bool `[B, N, 1]`, says so."""
        self._masks[embeds] = mask
        self._unread[embeds] = True

    def among(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The places of the inputs that are marked."""
        if not self._masks:
            return ()
        return tuple(place for place, value in enumerate(inputs) if isinstance(value, Tensor) and value in self._masks)

    def read(self, embeds: Any) -> Tensor:
        """The mask of embeddings.

        Raises:
            UnsupportedGraphError: They are not marked.
        """
        if not isinstance(embeds, Tensor) or embeds not in self._masks:
            raise UnsupportedGraphError(
                "tgvkv: this graph was compiled for embeddings into which another graph merged vision, and was handed others; "
                "where vision stands in the prompt cannot be seen. Give the model input_ids, not inputs_embeds"
            )
        self._unread.pop(embeds, None)
        mask: Tensor = self._masks[embeds]
        return mask

    def check_read(self) -> None:
        """Raises [`SplitDecoderError`][] where marked embeddings never came to a graph as they were."""
        if self._unread:
            self._masks.clear()
            self._unread.clear()
            raise SplitDecoderError(
                "vision features were merged in one graph, and the decoder in another was not handed the merged embeddings as "
                "they were: dynamo left code between them uncompiled (TORCH_LOGS=graph_breaks tells where). Call "
                "model.generate(), or run uncompressed with on_unsupported='passthrough'"
            )


def merged_before_break(gm: GraphModule, plan: Plan) -> ModalityMask | None:
    """The vision that a graph merges where dynamo broke it before the decoder; None for every other graph."""
    if plan.kind != "dense" or plan.misses or plan.modality is None or graph_break(gm) is None:
        return None
    return None if attends_to_merged(gm, plan.modality) else plan.modality


class MergingProgram:
    """Runs a graph that merges vision and holds no decoder, and marks the embeddings that it returns.

    Args:
        gm: The graph; it is made to return its masks as well.
        modality: What was found in it.
        marks: Where to take note.
        lower: Compiles the graph.
    """

    def __init__(
        self, gm: GraphModule, modality: ModalityMask, marks: VisionMarks, lower: Callable[[GraphModule], Callable[..., Any]]
    ) -> None:
        self._marks = marks
        self._merged = find_merged(gm, modality)
        self._outputs = len(output_nodes(gm))
        places = {node.name: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self._carried = [places[mask.meta[VISION_OF]] for mask in modality.masks if VISION_OF in mask.meta]
        own = [mask for mask in modality.masks if VISION_OF not in mask.meta]
        self._given = [places[mask.name] for mask in own if mask.op == "placeholder"]
        computed: list[Node] = [mask for mask in own if mask.op != "placeholder"]
        for mask in [mask for mask in modality.masks if VISION_OF in mask.meta]:
            gm.graph.erase_node(mask)
        gm.graph.output_node().args = ((*output_nodes(gm), *computed),)
        gm.recompile()
        self._run = lower(gm)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Inputs and outputs as dynamo's graph has them."""
        masks = [self._marks.read(inputs[place]) for place in self._carried]
        results = list(self._run(*inputs))
        masks += [inputs[place] for place in self._given] + results[self._outputs :]
        vision = vision_positions(tuple(masks))[..., None]
        for place in self._merged:
            self._marks.put(results[place], vision)
        return results[: self._outputs]


class MarkedProgram:
    """Runs a rewritten graph on the embeddings that other graphs merged vision into.

    Args:
        program: Takes a mask for each of `places` after the graph's inputs.
        marks: Where the masks are.
        places: Of the marked embeddings among the inputs.
    """

    def __init__(self, program: Callable[..., Any], marks: VisionMarks, places: Sequence[int]) -> None:
        self._program, self._marks, self._places = program, marks, places

    def __call__(self, *inputs: Any) -> Any:
        """Inputs and outputs as dynamo's graph has them."""
        masks = [self._marks.read(inputs[place]) for place in self._places]
        self._marks.check_read()
        return self._program(*inputs, *masks)
