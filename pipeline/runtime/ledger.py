"""A ledger of what a stage has finished so far: one JSON value a line, each on disk before work continues."""

import json
import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.runtime.artifacts import write_atomically
from pipeline.runtime.ranks import Ranks

T = TypeVar("T")


class Ledger(Generic[T]):
    """The finished entries of a stage, all of type `kind`.

    `kind` is a dataclass, tuple or mapping of JSON values. With `ranks` every rank holds the entries and calls every
    method; rank 0 alone reads and writes the file. Without, one process does.

    A last line without its newline was cut off and is dropped. Raise ValueError for any other line that holds no
    `kind`: the file is damaged.
    """

    def __init__(self, path: Path, kind: type[T], ranks: Ranks | None = None):
        self.path, self.writes = path, ranks is None or ranks.rank == 0
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        lines = _whole_lines(path) if self.writes else []
        if ranks is not None:
            lines = ranks.share(lines)
        self.entries = [self._entry(number, line) for number, line in enumerate(lines, 1)]

    def append(self, entry: T) -> None:
        """Add an entry; once this returns, it is on disk."""
        self.entries.append(entry)
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._adapter.dump_python(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the file, once the artifact holds the result."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def _entry(self, number: int, line: str) -> T:
        try:
            return self._adapter.validate_json(line, strict=True)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise ValueError(
                f"{self.path}, line {number} is damaged: {reason}; delete {self.path.parent} to start the stage again"
            ) from None


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that end in a newline, and drop what follows them from the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, newline, rest = text.rpartition("\n")
    if rest:
        write_atomically(path, whole + newline)
    return whole.split("\n") if newline else []
