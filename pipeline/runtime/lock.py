"""A lock between processes, held on a file; the kernel releases it when its process dies."""

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

LOOK = 0.5  # seconds between two tries


class Lock:
    """An advisory lock whose file names its owner while it is held. What the file holds otherwise has no meaning."""

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None

    def acquire(self, waiting: Callable[[str], None]) -> None:
        """Take the lock, however long its owner keeps it; `waiting` is called with each owner that is waited for.

        Raise ValueError where the file system has no locks.
        """
        announced = None
        while not self.try_acquire():
            owner = self._owner()
            if owner != announced:
                waiting(owner)
                announced = owner
            time.sleep(LOOK)

    def try_acquire(self) -> bool:
        """Take the lock and return True, or return False where another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            file.close()
            raise ValueError(f"{self.path.parent} has no file locks ({error.strerror}); use another disk") from None
        if not held:  # taken, or its last owner removed the file between our open and our lock
            file.close()
            return False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self.file = file
        return True

    def release(self) -> None:
        """Release the lock and remove its file; do nothing where it is not held."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def _owner(self) -> str:
        """Return the owner as its file names it, on one line whatever the file holds."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        words = "".join(letter if letter.isprintable() else " " for letter in text).split()
        return " ".join(words)[:100] or "another process"
