"""One file of weights for all ONNX files of an export: prefill and decode are the same decoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHTS = "weights.data"
_ALIGNMENT = 4096  # runtimes map the file, a page at a time
_CHUNK = 1 << 24


def share_weights(folder: Path, files: Sequence[str]) -> int:
    """Moves the external data of several ONNX files into `weights.data`, equal tensors once. Their own data files go.

    Args:
        folder: Where they are.
        files: Names of the ONNX files.

    Returns:
        Bytes of `weights.data`.
    """
    import onnx

    written: dict[tuple[str, int], int] = {}
    old: set[Path] = set()
    with (folder / WEIGHTS).open("wb") as weights:
        for file in files:
            model = onnx.load(str(folder / file), load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.data_location != onnx.TensorProto.EXTERNAL:
                    continue
                where = {entry.key: entry.value for entry in tensor.external_data}
                source, start, length = folder / where["location"], int(where.get("offset", 0)), int(where["length"])
                old.add(source)
                digest = _digest(source, start, length)
                if digest not in written:
                    weights.seek(-weights.tell() % _ALIGNMENT, 1)
                    written[digest] = weights.tell()
                    _copy(source, start, length, weights)
                _refer(tensor, written[digest], length)
            onnx.save(model, str(folder / file))
        size = weights.tell()
    for path in old:
        path.unlink()
    return size


def _refer(tensor: Any, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _parts(path: Path, start: int, length: int) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0:
            part = file.read(min(_CHUNK, length))
            if not part:
                raise OSError(f"{path} ends early: the export is incomplete")
            length -= len(part)
            yield part


def _digest(path: Path, start: int, length: int) -> tuple[str, int]:
    found = hashlib.sha256()
    for part in _parts(path, start, length):
        found.update(part)
    return found.hexdigest(), length


def _copy(path: Path, start: int, length: int, to: Any) -> None:
    for part in _parts(path, start, length):
        to.write(part)
