"""Disks: whether there is room for what is to be written, and whether a folder takes files and locks."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def need_space(folder: Path, needed: int) -> None:
    """ValueError where the disk that holds (or will hold) the folder has fewer than `needed` bytes for it.

    What an earlier attempt left in the folder counts as free: it is a part of what is needed, or makes room for it.
    """
    room = space_free(folder) + _stored(folder)
    if room < needed:
        raise ValueError(
            f"{folder} needs {size(needed)} and its disk has {size(room)} for it; set artifacts=<another disk>"
        )


def space_free(folder: Path) -> int:
    """Bytes free on the disk that holds, or will hold, the folder."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    return there


def probe(folder: Path) -> None:
    """Return where the folder, or what will hold it, takes files and locks, and leave nothing; OSError elsewhere."""
    with tempfile.TemporaryFile(dir=existing(folder)) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _stored(folder: Path) -> int:
    """Bytes of the files under a folder, where another rank may be at work; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
