"""JSON files of our own with a checksum of themselves, so that a damaged one is never read."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.runtime.hashing import text_digest
from pipeline.runtime.log import say

CHECKSUM = "checksum"
T = TypeVar("T")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file by one rename: a reader sees the old text or the new one, never a part."""
    fresh = temporary(path)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def temporary(path: Path) -> Path:
    """Return the name under which this process prepares what will replace `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Return whether a file has such a name: where its process is gone, it can be removed."""
    return re.fullmatch(r"\..+\.\d+", path.name) is not None


def record_text(fields: Mapping[str, Any]) -> str:
    """Return the fields as JSON text with a checksum of them."""
    return _layout({**fields, CHECKSUM: text_digest(_layout(fields))})


def read_record(path: Path) -> dict[str, Any]:
    """Return the fields that `record_text` laid out.

    Raise ValueError, which names the file without its folder, where it is missing or differs in a single character.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
        intact = isinstance(fields, dict) and fields.pop(CHECKSUM, None) and record_text(fields) == text
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not intact:
        raise ValueError(f"{path.name} does not match its own {CHECKSUM}")
    return fields


def save_record(path: Path, value: object) -> None:
    """Write a JSON value with its checksum, atomically."""
    write_atomically(path, record_text({"value": json.loads(json.dumps(value))}))  # keys become texts before sorting


def load_record(path: Path, empty: T) -> T:
    """Return what `save_record` wrote, or `empty` where there is none.

    A damaged record is reported in one line and counts as none.
    """
    if not path.exists():
        return empty
    try:
        value: Any = read_record(path).get("value")
        fault = None if isinstance(value, type(empty)) else "it holds another kind of value"
    except ValueError as error:
        fault = str(error)
    if fault:
        say(f"{path} is damaged ({fault}); it counts as none", 0)
        return empty
    return value


def _layout(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"
