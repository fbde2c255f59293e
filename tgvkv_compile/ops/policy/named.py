"""The rankings that have a name."""

from tgvkv_compile.ops.policy.h2o import h2o
from tgvkv_compile.ops.policy.knorm import knorm
from tgvkv_compile.ops.policy.layer import Ranking
from tgvkv_compile.ops.policy.snapkv import snapkv
from tgvkv_compile.ops.policy.streaming import streaming
from tgvkv_compile.ops.policy.tgv import twr
from tgvkv_compile.ops.policy.uniform import uniform

RANKINGS: dict[str, Ranking] = {
    "twr": twr,
    "snapkv": snapkv,
    "h2o": h2o,
    "streaming": streaming,
    "knorm": knorm,
    "random": uniform(seed=0),
}

LAYERS_ALIKE = frozenset(RANKINGS) - {"random"}
"""Those that do not ask which layer it is."""
