"""manifest.json: what an artifact was made from, and the size and digest of each of its files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.hashing import file_digest, files_of
from pipeline.runtime.records import read_record, record_text

MANIFEST = "manifest.json"
SIZE, CONTENT = "bytes", "xxh3_128"


@dataclass(frozen=True)
class Manifest:
    """The record of one artifact: `facts` are its stage, settings, inputs, costs; `files`: name -> size, digest."""

    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def text(self) -> str:
        """Return the manifest as it is stored."""
        return record_text({**self.facts, "files": self.files})


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder; raise ValueError with the reason where it is missing, changed or incomplete."""
    fields = read_record(folder / MANIFEST)
    files = fields.pop("files", None)
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} names no files")
    if any(not isinstance(facts, dict) or set(facts) != {SIZE, CONTENT} for facts in files.values()):
        raise ValueError(f"{MANIFEST} has no {SIZE} and {CONTENT} of each file")
    return Manifest(fields, files)


def sealed(path: Path) -> dict[str, Any]:
    """Return a file's entry of a manifest, its bytes being on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {SIZE: path.stat().st_size, CONTENT: file_digest(path)}


def damage(folder: Path, content: bool) -> str | None:
    """Return what is wrong with a published folder, in one line, or None.

    Names and sizes of all files are compared with the manifest and, with `content`, the digests of their bytes.
    """
    try:
        manifest = read_manifest(folder)
        present = dict(files_of(folder))
        present.pop(MANIFEST)
        for name, facts in manifest.files.items():
            if name not in present:
                return f"{name} is missing"
            size = present.pop(name).stat().st_size
            if size != facts[SIZE]:
                return f"{name} has {size} bytes, not {facts[SIZE]}"
            if content and file_digest(folder / name) != facts[CONTENT]:
                return f"the bytes of {name} have changed"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if present:
        return f"{min(present)} is no file of the artifact"
    return None
