"""A ledger of what a stage has finished so far: one JSON value a line, each on disk before work continues."""

import json
import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.runtime.hashing import text_digest
from pipeline.runtime.log import say
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.records import write_atomically

T = TypeVar("T")


class Ledger(Generic[T]):
    """The finished entries of a stage, all of type `kind`.

    `kind` is a dataclass, tuple or mapping of JSON values. With `ranks` every rank holds the entries and calls every
    method; rank 0 alone reads and writes the file. Without, one process does.

    Each line has a checksum. From the first line that was cut off or changed, or holds no `kind`, the rest is dropped:
    it is done again.
    """

    def __init__(self, path: Path, kind: type[T], ranks: Ranks | None = None):
        self.path, self.writes = path, ranks is None or ranks.rank == 0
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        lines = self._sound_lines() if self.writes else []
        if ranks is not None:
            lines = ranks.share(lines)
        self.entries = [self._entry(line) for line in lines]

    def append(self, entry: T) -> None:
        """Add an entry; once this returns, it is on disk."""
        self.entries.append(entry)
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(self._adapter.dump_python(entry, mode="json")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the file, once the artifact holds the result."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def _entry(self, line: str) -> T:
        """Return the entry of a line; raise ValueError where it is none that was written."""
        fields = json.loads(line)
        if not isinstance(fields, dict) or "entry" not in fields or _line(fields["entry"]) != line:
            raise ValueError("the line does not match its checksum")
        return self._adapter.validate_json(json.dumps(fields["entry"]), strict=True)

    def _sound_lines(self) -> list[str]:
        """Return the lines up to the first damaged one, and drop the others from the file."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        *lines, rest = text.split("\n")
        sound: list[str] = []
        for line in lines:
            try:
                self._entry(line)
            except (ValueError, ValidationError, RecursionError):
                say(f"{self.path}, line {len(sound) + 1} is damaged; it and what follows are done again", 0)
                break
            sound.append(line)
        if rest or len(sound) < len(lines):
            write_atomically(self.path, "".join(f"{line}\n" for line in sound))
        return sound


def _line(entry: object) -> str:
    return json.dumps({"entry": entry, "checksum": text_digest(json.dumps(entry))})
