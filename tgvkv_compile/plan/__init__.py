"""What the finders found and what the planner decided: frozen records, no behaviour."""

from tgvkv_compile.plan.records import (
    AttentionSite,
    FeatureAddition,
    GraphKind,
    GraphPlan,
    KVAppend,
    MaskFunction,
    Miss,
    ModalityMask,
    TensorParallel,
    render_misses,
)

__all__ = [
    "AttentionSite",
    "FeatureAddition",
    "GraphKind",
    "GraphPlan",
    "KVAppend",
    "MaskFunction",
    "Miss",
    "ModalityMask",
    "TensorParallel",
    "render_misses",
]
