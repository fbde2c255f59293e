"""The handwritten digits: real 8 x 8 scans, split once into training scans and held-out scans.

The held-out scans travel with the package. The training scans do not: only training needs them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

SCAN_SIZE = 8
MAX_INK = 16
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
