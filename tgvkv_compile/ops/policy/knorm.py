"""Key norms (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""

from tgvkv_compile.ops.policy.layer import Layer, Ranked


def knorm(layer: Layer) -> Ranked:
    """Keys of small norm receive much attention: `score = 1 / (1 + mean over heads of ||k||)`.

    Adapted: norms are averaged over heads, because all heads of a layer keep the same entries here.

    Returns:
        `score [B, S]`.
    """
    norm = layer.mean_heads(layer.key.float().square().sum(3).sqrt())
    return Ranked(1.0 / (1.0 + norm))
