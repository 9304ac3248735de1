"""Heartbeats: each rank increments its own counter and watches its neighbour's, so that none waits for a dead rank.

A collective whose partner is gone cannot be interrupted from Python, some calls of the store wait as long as TCP does,
and each library has a limit of its own. A process that learns of a failure while its main thread is blocked therefore
prints the reason and ends itself.
"""

import os
import sys
import threading
import time

import torch.distributed as dist

from pipeline.runtime.faults import REPORTER

EVERY = 5.0  # most seconds between two heartbeats
GRACE = 30.0  # most seconds that the main thread has to end by itself
GAVE_UP = 70  # the exit code of a process that ended itself
FAILED = "failed"  # key under which a rank that fails stores the reason
SILENT = "silent"  # key under which the watcher of a rank without heartbeats stores that


def alive(rank: int) -> str:
    """Return the key of a rank's heartbeat."""
    return f"alive/{rank}"


class Pulse:
    """The heartbeats of one rank; `store`: a connection of its own; `timeout`: seconds without a heartbeat."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self._store, self._rank, self._timeout = store, rank, timeout
        self._neighbour = (rank + 1) % world
        self._every = min(EVERY, timeout / 4)
        self._reason: str | None = None
        self._prints = True  # where the store does not answer, nobody knows whether another rank prints
        self._answered = time.monotonic()  # when the store last answered
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, name="pulse", daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop; the neighbour that watches this rank sees that it left."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=EVERY)

    def _beat(self) -> None:
        """Send and check heartbeats; set `_reason` where this process should end."""
        seen, heard = -1, time.monotonic()
        try:
            while self._reason is None:
                self._store.add(alive(self._rank), 1)
                for key in (FAILED, SILENT):
                    if self._store.check([key]):
                        self._reason = self._store.get(key).decode()
                sign = self._store.add(alive(self._neighbour), 0)
                now = self._answered = time.monotonic()
                if sign != seen or self._store.check([f"left/{self._neighbour}"]):
                    seen, heard = sign, now
                elif now - heard > self._timeout and self._reason is None:
                    self._reason = f"rank {self._neighbour} sent no heartbeat for {self._timeout:g} s"
                    self._store.set(SILENT, self._reason)
                if self._reason is not None:
                    self._prints = REPORTER.prints(self._store)
                if self._stop.wait(self._every):
                    self._store.set(f"left/{self._rank}", "")
                    return
        except dist.DistError:  # the process that held the store ended: `_watch` sees that it answers no more
            return

    def _watch(self) -> None:
        """End the process when it should end and does not."""
        while not self._stop.wait(self._every):
            silence = time.monotonic() - self._answered
            if self._reason is not None:
                own = self._reason.startswith(f"rank {self._rank} failed")
                if own or self._stop.wait(min(GRACE, self._timeout)):
                    return
            elif silence > self._timeout:
                self._reason = f"the store that all ranks share did not answer for {silence:.0f} s"
            else:
                continue
            if self._prints:
                print(f"error: rank {self._rank} stops: {self._reason}", file=sys.stderr, flush=True)
            os._exit(GAVE_UP)
