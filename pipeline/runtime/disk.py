"""Disks: free space, and whether files can be written and locked in a folder."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path


def need_space(folder: Path, needed: int) -> None:
    """Raise ValueError where the disk that holds, or will hold, the folder has fewer than `needed` bytes for it.

    What an interrupted attempt left in the folder counts as free: it is reused or overwritten.
    """
    room = space_free(folder) + _stored(folder)
    if room < needed:
        raise ValueError(
            f"artifacts: {folder} needs {size(needed)} and its disk has {size(room)}; set artifacts to another disk"
        )


def space_free(folder: Path) -> int:
    """Return the bytes free on the disk that holds, or will hold, the folder."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def probe(folder: Path) -> None:
    """Raise OSError where files cannot be written and locked in the folder, or in the one that will hold it."""
    with tempfile.TemporaryFile(dir=existing(folder)) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def size(count: int) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _stored(folder: Path) -> int:
    """Return the bytes of the files under a folder, which another rank may be writing; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
