"""A lock between processes, held on a file; the kernel drops it when its process dies."""

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

LOOK = 0.5  # seconds between two tries


class Lock:
    """An advisory lock whose file names its owner while it is held."""

    def __init__(self, path: Path):
        self.path = path
        self.file = None

    def acquire(self, waiting: Callable[[str], None]) -> None:
        """Take the lock, however long its owner keeps it; `waiting` is called with each owner that is waited for.

        ValueError where the file system has no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = None
        while not self._try():
            owner = self._owner()
            if owner != told:
                waiting(owner)
                told = owner
            time.sleep(LOOK)

    def release(self) -> None:
        """Give the lock back and remove its file; nothing where it is not held."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def _try(self) -> bool:
        file = self.path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as fault:
            file.close()
            raise ValueError(f"{self.path.parent} has no file locks ({fault.strerror}); use another disk") from None
        if not held:  # taken, or its last owner removed the file between our open and our lock
            file.close()
            return False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self.file = file
        return True

    def _owner(self) -> str:
        try:
            return self.path.read_text() or "another process"
        except FileNotFoundError:
            return "another process"
