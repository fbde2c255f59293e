"""The handwritten digits: real 8 x 8 scans, split once into training scans and held-out scans.

The held-out scans travel with the package, so composing a held-out picture needs no scikit-learn. The training scans
do not: only training needs them, and `split_scans` reads them from scikit-learn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

SCAN_SIZE = 8
MAX_INK = 16
HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 20240
HELD_OUT_FILE = "held_out_scans.safetensors"


@dataclass(frozen=True)
class Scans:
    """A set of scans with their labels.

    Attributes:
        images: `[M, 8, 8]` uint8, ink from 0 (paper) to 16 (full ink).
        labels: `[M]` uint8, the digit, 0 to 9.
        indices: `[M]` int32, the row of each scan in scikit-learn's `load_digits()`.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    indices: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """The number of scans, `M`."""
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 over the indices, the labels and the images: names this exact set of scans."""
        parts = (self.indices.astype("<i4"), self.labels, self.images)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


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
            "pip install 'tgvkv-compile[train]'. Evaluation does not need it: use load_held_out()"
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


def load_held_out(path: Path) -> Scans:
    """Reads the held-out scans that travel with the model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The scans are not the ones that the file's digest names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no held-out scans at {path}: reinstall the package, or run `make train` to make them")
    with safe_open(path, framework="np") as opened:
        metadata = opened.metadata() or {}
        scans = Scans(opened.get_tensor("images"), opened.get_tensor("labels"), opened.get_tensor("indices"))
    if metadata.get("held_out_sha256") != scans.digest():
        raise ValueError(f"the scans in {path} do not match the digest stored beside them: restore the file")
    return scans
