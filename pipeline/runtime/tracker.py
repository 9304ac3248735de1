"""What a run reports to a tracker: metrics, files and pictures."""

from collections.abc import Mapping
from pathlib import Path


class Track:
    """The interface of trackers. This one records nothing; other ranks than the first and a disabled tracker use it."""

    def __enter__(self) -> "Track":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.finish(failed=error is not None)

    def log(self, metrics: Mapping[str, float], step: int | None, stage: str) -> None:
        """Record a stage's metrics at a step of that stage's own axis; without a step, as results of the run."""

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Record a file or a folder of a kind such as `blueprint` or `report`."""

    def image(self, path: Path, name: str) -> None:
        """Record a picture file."""

    def table(self, path: Path, name: str) -> None:
        """Record a CSV file as a table."""

    def finish(self, failed: bool = False) -> None:
        """Close the run, marked as failed or not."""
