"""JSON lines: one object per line, of which columns are text or turns."""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.columns import Value, columns, value_of

RECORD = 1 << 28  # bytes of the longest line that is read


def records(path: Path, field: str) -> Iterator[tuple[str, Value]]:
    """Yield each record's place, as errors name it, and what its column holds.

    Raise ValueError, naming file and line, for a line that is no JSON object in UTF-8, is longer than RECORD, lacks the
    column, or holds neither a text nor a list there.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(RECORD + 1):
            number += 1
            if len(line) > RECORD:
                raise ValueError(f"{path}:{number} is longer than {RECORD >> 20} MiB; write a record per line")
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            record = _record(f"{path}:{number}", line)
            check_column(f"{path}:{number}", field, record)
            yield f"{path}:{number}: column {field!r}", value_of(record, field, f"{path}:{number}")


def _record(place: str, line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as fault:
        raise ValueError(f"{place} is not UTF-8 at byte {fault.start + 1} of the line; convert the file") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply to be a record of text; leave it out") from None
    except KeyError as fault:
        key = printable(f"{fault.args[0]!r:.80}")
        raise ValueError(f"{place} has the key {key} twice in one object; write it once") from None
    except ValueError as fault:
        raise ValueError(f"{place} is not a JSON object, as a .jsonl line is ({fault!s:.80}); correct it") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object, as a .jsonl line is; give one object a line")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raise KeyError for a key that it has twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return record


def printable(name: str) -> str:
    """Return a name that comes from a file as part of one line: what does not print is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def check_column(place: str, field: str, known: Iterable[str]) -> None:
    """Raise ValueError where a column that `field` names is none of the known ones."""
    missing = [name for name in columns(field, known) if name not in known]
    if missing:
        names = ", ".join(printable(str(column)) for column in known) or "none"
        fault = f"{place} has no column {missing[0]!r} but {names}"
        raise ValueError(f"{fault:.400}; set data.text_field to the one that holds text or turns")
