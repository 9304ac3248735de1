"""Faults that the command line reports in one line, and which rank prints it. Loads without torch."""

import os
import threading
from typing import Protocol


class PeerFailed(RuntimeError):
    """Another rank failed, died or sent no heartbeat for too long."""


class Store(Protocol):
    """The part of torch's key-value store that a reporter uses."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its new value."""


class Reporter:
    """Decides which rank of a node prints why a run ends: its first one before the ranks have met, then whichever asks
    first, so that one of those that are left prints whatever became of the others."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._prints: bool | None = None
        self._lock = threading.Lock()

    def meet(self, store: Store | None) -> None:
        """Begin to decide with the other ranks of a store; with None, without them."""
        self._store, self._prints = store, None

    def prints(self, store: Store | None = None) -> bool:
        """Return whether this process prints; what it was answered first stays.

        `store`: a connection of the calling thread; None uses that of `meet`. Where the store is gone, nothing is known
        of the other ranks and each prints.
        """
        with self._lock:
            if self._prints is None:
                store = store or self._store
                if store is None:
                    return os.environ.get("LOCAL_RANK", "0") == "0"
                try:
                    self._prints = store.add(f"printed/{os.environ.get('GROUP_RANK', '0')}", 1) == 1
                except RuntimeError:  # every error of a store is one
                    self._prints = True
            return self._prints


REPORTER = Reporter()  # of this process
