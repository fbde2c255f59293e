"""Frozen records from JSON, checked by the types of their fields: what a file says is held against what the code expects."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tgvkv_compile.errors import ConfigError

Record = TypeVar("Record")


def read_json(path: Path, *, written_by: str) -> Any:
    """What a JSON file holds.

    Args:
        path: Of the file.
        written_by: Who writes such files, for the message.

    Raises:
        ConfigError: There is no such file, or it is not JSON.
    """
    if path.parent.is_file():
        raise ConfigError(f"{path.parent} is a file; give the folder that {written_by} wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}; give the folder that {written_by} wrote") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a file; give the folder that {written_by} wrote") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or type(error).__name__}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); export the model again") from None


def record_of(kind: type[Record], given: object, where: str, made: Mapping[str, Any] | None = None) -> Record:
    """A record of the class `kind` from the object that JSON has for it.

    Args:
        kind: A dataclass; its fields are ints, strings, lists and objects of such, records, or what may be None or another.
        given: What was read.
        where: Its place, for the message.
        made: Fields that are made already.

    Raises:
        ConfigError: A field is missing, unknown, or of another type.
    """
    made = made or {}
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise _wrong(where, given, "an object")
    odd = sorted(map(str, (names - set(made)) ^ set(given)))
    if odd:
        raise ConfigError(f"{where} lacks, or has too many, fields: {', '.join(odd)}; export the model again")
    hints = typing.get_type_hints(kind)
    read = {name: _value(hints[name], value, f"{where}: {name}") for name, value in given.items()}
    try:
        return kind(**read, **made)
    except ConfigError as error:  # what a record says of its own fields
        raise ConfigError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the type `hint`: JSON has lists for tuples."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return record_of(hint, value, where)  # type: ignore[arg-type]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is types.UnionType:
        fitting = [part for part in parts if _is_a(part, value)] or [part for part in parts if dataclasses.is_dataclass(part)]
        if not fitting:
            raise _wrong(where, value, " or ".join(_NAMES.get(part, part.__name__) for part in parts))
        return None if value is None else _value(fitting[0], value, where)
    if not _is_a(kind or hint, value):
        raise _wrong(where, value, _NAMES[kind or hint])
    if kind is dict:
        return {name: _value(parts[1], each, f"{where}.{name}") for name, each in value.items()}
    if kind in (list, tuple):
        return kind(_value(parts[0], each, f"{where}[{place}]") for place, each in enumerate(value))
    return value


_NAMES: dict[Any, str] = {
    int: "an int",
    str: "a string",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def _is_a(kind: Any, value: object) -> bool:
    return type(value) is (list if kind is tuple else kind)  # a bool is no int


def _wrong(where: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{where} is {str(value)[:40]!r}, not {wanted}; export the model again")
