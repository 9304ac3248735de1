"""One of two ranks is killed at a random call of a stage; the other must end, and the same command must resume."""

import random
import signal
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.heartbeat import GAVE_UP
from tests.injection import answered, started

ENDS = (0, 2, GAVE_UP)  # exit codes of a rank whose neighbour died; 0 where it died after its last part


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit code of each rank or minus its signal, calls of each stage by rank, output by rank."""

    status: list[int | None]
    calls: list[dict[str, int] | None]
    outlived: float  # seconds from the end of one rank to that of the other
    outputs: list[str]


@dataclass(frozen=True)
class Death:
    """Which rank was killed, in which stage, and how long the other one ran on."""

    stage: str
    rank: int
    seconds: float


class RankDriver:
    """A process that runs the pipeline on two ranks and kills one of them; see rank_driver.py."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._folder, self._number = process, folder, 0

    def run(self, overrides: list[str], rank: int = 0, stage: str | None = None, at: int = 0) -> Outcome:
        """Run both ranks once; `rank` is killed before call `at` of `stage` ("cut/1": of round 1), if one is named."""
        self._number += 1
        log = self._folder / f"attempt-{self._number}"
        job = {"overrides": overrides, "log": str(log), "rank": rank, "stage": stage, "at": at}
        answer = answered(self._process, self._folder, job)
        outputs = [Path(f"{log}-{each}").read_text(errors="replace") for each in range(len(answer["status"]))]
        return Outcome(**answer, outputs=outputs)


@contextmanager
def rank_driver(folder: Path) -> Iterator[RankDriver]:
    """Start a driver whose logs are in `folder`."""
    with started("tests.injection.rank_driver", folder, {}) as process:
        yield RankDriver(process, folder)


def walk(
    driver: RankDriver,
    overrides: list[str],
    calls: list[dict[str, int]],
    longest: float,
    draw: random.Random,
    stages: Collection[str] | None = None,
) -> Iterator[Death]:
    """Run a command once for each stage, a random rank killed at a random call of that stage, then to its end.

    `calls`: those of each rank in a run that nobody disturbed; `longest`: seconds that the other rank may run on;
    `stages`: limits the deaths to some of them. AssertionError where it runs longer, ends in anything but one line, or
    the last run does not finish.
    """
    for stage in calls[0]:
        if stages is not None and stage not in stages:
            continue
        rank = draw.randrange(len(calls))
        at = draw.randint(1, calls[rank][stage])
        outcome = driver.run(overrides, rank, stage, at)
        other = 1 - rank
        where = f"rank {rank} at call {at} of {stage}: {outcome.status}\n{outcome.outputs[other][-3000:]}"
        assert outcome.status[rank] == -signal.SIGKILL and outcome.status[other] in ENDS, where
        assert outcome.outlived < longest, where
        assert "Traceback" not in outcome.outputs[other], where
        errors = [line for line in outcome.outputs[other].splitlines() if line.startswith("error: ")]
        assert len(errors) == (outcome.status[other] != 0), where
        yield Death(stage, rank, outcome.outlived)
    outcome = driver.run(overrides)
    assert outcome.status == [0, 0], outcome.outputs
