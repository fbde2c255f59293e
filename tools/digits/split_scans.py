"""Scikit-learn's scans of handwritten digits, split once into training scans and held-out scans."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tgvkv_compile.digits.scans import Scans

HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 20240


def split_scans(seed: int = SPLIT_SEED) -> tuple[Scans, Scans]:
    """Splits scikit-learn's 1797 scans into (training, held-out); the same seed gives the same split.

    Args:
        seed: Seed of the permutation. The shipped held-out file was made with the default.

    Returns:
        The training scans and the held-out scans, disjoint and together complete.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        datasets = import_module("sklearn.datasets")  # by name: an optional extra, without types
    except ImportError as error:
        raise ImportError(
            "the training scans come from scikit-learn, which is not installed: "
            "pip install scikit-learn. Evaluation does not need it: use load_held_out()"
        ) from error
    data = datasets.load_digits()
    images = np.asarray(data.images, dtype=np.uint8)
    labels = np.asarray(data.target, dtype=np.uint8)
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = round(len(labels) * HELD_OUT_FRACTION)

    def take(chosen: npt.NDArray[np.int64]) -> Scans:
        chosen = np.sort(chosen)
        return Scans(images[chosen], labels[chosen], chosen.astype(np.int32))

    return take(order[cut:]), take(order[:cut])


def save_held_out(held_out: Scans, training: Scans, path: Path) -> None:
    """Writes the held-out scans, and the digest of the training scans, to a safetensors file."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "images": held_out.images,
        "labels": held_out.labels,
        "indices": held_out.indices,
    }
    save_file(
        tensors,
        path,
        metadata={
            "source": "scikit-learn load_digits(); UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
            "split_seed": str(SPLIT_SEED),
            "held_out_sha256": held_out.digest(),
            "training_sha256": training.digest(),
        },
    )
    path.chmod(0o644)  # safetensors leaves it readable by the owner alone
