"""Where a graph was called from: behind the cut, where the whole model is compiled, or by itself."""

from torch.fx import GraphModule

_KEY = "tgvkv_behind_cut"


def mark_behind_cut(gm: GraphModule) -> None:
    """Says that the whole model is compiled, and that `gm` is its decoder or its step."""
    gm.meta[_KEY] = True


def is_behind_cut(gm: GraphModule) -> bool:
    """Whether `mark_behind_cut` said so of this graph or of the one that it is a copy of."""
    return bool(gm.meta.get(_KEY))
