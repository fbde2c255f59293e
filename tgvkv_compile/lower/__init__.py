"""From a rewritten graph to a callable."""

from tgvkv_compile.lower.lowered import Lowered, lower_dense, lower_rewritten, records_cuda_graphs

__all__ = ["Lowered", "lower_dense", "lower_rewritten", "records_cuda_graphs"]
