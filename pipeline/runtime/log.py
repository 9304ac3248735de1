"""Progress and messages on the console: rank 0 prints, the other ranks are silent."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds between progress lines where no terminal shows a bar
T = TypeVar("T")


def progress(iterable: Iterable[T], total: int | None, label: str, rank: int) -> Iterator[T]:
    """Yield the items and show on standard error how many are done, the rate and the time left.

    A terminal shows a bar; otherwise a line is printed every `EVERY` seconds. `total` is None where the number of items
    is not known.
    """
    if rank != 0:
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=label, file=sys.stderr, dynamic_ncols=True, leave=False)
    else:
        yield from _lines(iterable, total, label)


def say(line: str, rank: int) -> None:
    """Print a line on standard output, on rank 0 only and above a running progress bar."""
    if rank == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Disable the progress bars that other libraries draw with tqdm where standard error is no terminal."""
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=None)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _lines(iterable: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    start = shown = time.monotonic()
    for done, item in enumerate(iterable):
        yield item
        now = time.monotonic()
        if now - shown >= EVERY and done + 1 != total:
            shown = now
            print(_line(label, done + 1, total, now - start), file=sys.stderr, flush=True)


def _line(label: str, done: int, total: int | None, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    if total is None:
        return f"{label}: {done} in {_clock(seconds)}, {rate:.3g}/s"
    return f"{label}: {done}/{total} ({done / total:.0%}), {rate:.3g}/s, {_clock((total - done) / rate)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
