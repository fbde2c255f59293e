"""What a ranking of one's own is written with (`docs/policies.md`)."""

from tgvkv_compile.ops.policy.layer import Layer, Ranked, Ranking
from tgvkv_compile.ops.policy.named import RANKINGS
from tgvkv_compile.ops.policy.uniform import uniform
from tgvkv_compile.ops.weighing import Weighed

__all__ = ["RANKINGS", "Layer", "Ranked", "Ranking", "Weighed", "uniform"]
