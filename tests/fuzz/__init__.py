"""Malformed inputs by the thousand: each is refused in one line, or read and verified."""

import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given
from hypothesis import seed as seeded
from hypothesis import settings as limits
from hypothesis.strategies import SearchStrategy

from pipeline.cli.boundary import known

SECONDS = 30.0  # that a case may take before it counts as hung


@dataclass(frozen=True)
class Target:
    """A kind of input. `read` takes a case as a run would, ValueError where it is refused; `verify` takes a case and
    what `read` returned, and raises AssertionError where the case should have been refused or was read wrongly."""

    cases: SearchStrategy[Any]
    read: Callable[[Any], Any]
    verify: Callable[[Any, Any], None]


@dataclass
class Found:
    """What became of the cases of a target: `counts` by outcome; `faults`, of which each kind is kept once."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)  # where and what -> the case and the traceback


class Refused(Exception):
    """What a target raises where its input was refused by an answer, not by an error."""


class Hung(BaseException):
    """A case took longer than SECONDS."""


def run(target: Target, cases: int, seed: int) -> Found:
    """Draw cases of a target and return what became of them: read, refused, traceback, hang or accepted wrongly."""
    found = Found()

    @seeded(seed)
    @limits(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def each(case: Any) -> None:
        found.counts[_outcome(target, case, found.faults)] += 1

    each()
    return found


def _outcome(target: Target, case: Any, faults: dict[str, str]) -> str:
    kind = "traceback"
    try:
        with _limit():
            try:
                result = target.read(case)
            except Refused:
                return "refused"
            except ValueError as fault:
                if known(fault) is None or "\n" in str(fault):
                    raise
                return "refused"
            kind = "accepted wrongly"
            target.verify(case, result)
            return "read"
    except Hung as fault:
        kind, error = "hang", fault
    except BaseException as fault:  # a library in Rust raises panics, which are no Exception
        if isinstance(fault, KeyboardInterrupt):
            raise
        error = fault
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{kind}: {type(error).__name__} at {frame.filename}:{frame.lineno}"
    faults.setdefault(place, f"{case!r:.3000}\n{''.join(traceback.format_exception(error))[-3000:]}")
    return kind


@contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
