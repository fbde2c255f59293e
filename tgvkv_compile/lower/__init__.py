"""From a rewritten graph to a callable."""

from tgvkv_compile.lower.lowered import Lowered, lower_dense, lower_rewritten

__all__ = ["Lowered", "lower_dense", "lower_rewritten"]
