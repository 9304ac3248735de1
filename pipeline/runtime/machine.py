"""The machine as a stage uses it: one value with its device, its ranks, its output and its tracker."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pipeline.runtime import log
from pipeline.runtime.device import Device
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.tracker import Track

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Device, ranks and tracker of this process."""

    device: Device
    ranks: Ranks
    track: Track

    def progress(self, iterable: Iterable[T], total: int | None, label: str) -> Iterator[T]:
        """Yield the items and show progress and the time left on rank 0's standard error."""
        return log.progress(iterable, total, label, self.ranks.rank)

    def say(self, line: str) -> None:
        """Print one line from rank 0."""
        log.say(line, self.ranks.rank)
