"""How many graphs were compiled, of those that are ours to count."""

import inspect
from typing import Any


def of_decoder(graphs: dict[str, int]) -> dict[str, int]:
    """How many graphs dynamo makes of the rest is its own affair."""
    return {kind: count for kind, count in graphs.items() if kind != "dense"}


def of_generate(model: Any, graphs: dict[str, int]) -> dict[str, int]:
    """All graphs, or those of the decoder where `generate` of an older transformers encodes vision inside of the model."""
    return dict(graphs) if "mm_encoder_outputs" in inspect.signature(model.forward).parameters else of_decoder(graphs)
