"""Digests: of settings, of a file's bytes, of a model folder.

Bytes are hashed by XXH3 (128 bits): it detects accidents at the speed of reading. It is no protection against a person
who can write to the artifacts, who could as well write a manifest.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

BLOCK = 1 << 20  # bytes read at once
RECENT = 10**8  # nanoseconds: a file changed later than this before it was hashed may change again unnoticed

_known: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, time of change -> digest of the bytes


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of the value's canonical JSON.

    Raise ValueError for a value that JSON cannot hold.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"a setting is no JSON value ({error}); use numbers, strings, lists and mappings") from None
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def text_digest(text: str) -> str:
    """Return the XXH3 digest of a text, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def file_digest(path: Path) -> str:
    """Return the XXH3 digest of a file's bytes, 32 hexadecimal digits; each file is read once per process.

    A link is followed. A file whose size or time of change differs from before is read again.
    """
    with Path(path).open("rb", buffering=0) as file:
        facts = os.fstat(file.fileno())
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key in _known:
            return _known[key]
        settled = time.time_ns() - facts.st_mtime_ns > RECENT
        hasher = xxhash.xxh3_128()
        block = memoryview(bytearray(BLOCK))
        while count := file.readinto(block):
            hasher.update(block[:count])
    if settled:
        _known[key] = hasher.hexdigest()
    return hasher.hexdigest()


def fingerprint(folder: Path) -> str:
    """Return twelve hexadecimal digits that identify the names and bytes of a model folder's files, or of one file.

    Every byte counts; where the files are and when they were written does not. Raise ValueError for a missing folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; give a folder with a model")
    return digest([(name, path.stat().st_size, file_digest(path)) for name, path in files_of(folder)])


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files under a folder, sorted, as (name inside the folder, path), without hidden ones.

    A file yields itself. A link to a file counts as a file.
    """
    if folder.is_file():
        yield folder.name, folder
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path
