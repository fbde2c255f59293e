"""From a rewritten graph to a callable."""

from tgvkv_compile.lower.beside import prepare_inductor
from tgvkv_compile.lower.lowered import Lowered, lower_dense, lower_rewritten, records_cuda_graphs

__all__ = ["Lowered", "lower_dense", "lower_rewritten", "prepare_inductor", "records_cuda_graphs"]
