"""Faults put into real runs: a process killed, a full or failing disk, a short write, at any operation on files."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.artifacts import DAMAGED, PARTIAL
from pipeline.runtime.hashing import files_of
from pipeline.runtime.manifest import read_manifest
from tests.world import ROOT, environment

HERE = Path(__file__).parent
MEASURED = ("report", "evaluate", "evaluate_reference")  # artifacts that hold times, or paths of the run
TIMED = ("metrics.jsonl",)  # files that hold times


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit code or minus the signal, operations on files, seconds, and its output."""

    status: int
    operations: int | None
    seconds: float
    output: str


class Driver:
    """A process that runs the pipeline with faults; see driver.py."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._folder, self._number = process, folder, 0

    def run(
        self, overrides: list[str], root: Path, kind: str = "none", at: int = 0, seconds: float | None = None
    ) -> Outcome:
        """Run the pipeline once; operations under `root` count, and number `at` of them fails as `kind` says."""
        self._number += 1
        log = self._folder / f"attempt-{self._number}.log"
        job = {"overrides": overrides, "root": str(root), "kind": kind, "at": at, "seconds": seconds, "log": str(log)}
        return Outcome(**answered(self._process, self._folder, job), output=log.read_text(errors="replace"))


@contextmanager
def driver(folder: Path) -> Iterator[Driver]:
    """Build faulty.c and start a driver whose logs are in `folder`; RuntimeError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "faulty.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faulty.c", "-ldl"], check=True)
    with started("tests.injection.driver", folder, {"LD_PRELOAD": str(library)}) as process:
        yield Driver(process, folder)


@contextmanager
def started(module: str, folder: Path, more: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start a module that answers a line of JSON with another, its output in driver.log; end it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "driver.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=environment() | {"TOKENIZERS_PARALLELISM": "false"} | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        while (line := process.stdout.readline()) != "ready\n":  # what libraries print while they are imported
            if not line:
                raise RuntimeError((folder / "driver.log").read_text()[-3000:])
        yield process
    finally:
        process.stdin.close()
        process.wait(60)


def answered(process: subprocess.Popen, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Send a job to a process of `started` and return its answer."""
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the driver ended: {(folder / 'driver.log').read_text()[-3000:]}")
    return json.loads(line)


def student_of(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of a delivered student's files, without the record of its export."""
    names = (pair for pair in files_of(folder) if pair[0] != "export.json")
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names}


def made_of(artifacts: Path) -> dict[str, Mapping[str, Any]]:
    """Return artifact -> its files' sizes and digests, without those that hold times or paths."""
    found = {}
    for folder in artifacts.iterdir():
        if folder.name not in (PARTIAL, DAMAGED) and not folder.name.startswith(MEASURED):
            files = read_manifest(folder).files
            found[folder.name] = {name: facts for name, facts in files.items() if name not in TIMED}
    return found


def leftovers(artifacts: Path) -> list[str]:
    """Return what interrupted attempts left: partial folders, damaged artifacts, temporary files beside them.

    The file of a lock may be left where its process died between publishing and releasing: nobody holds it.
    """
    inner = [path for name in (PARTIAL, DAMAGED) for path in artifacts.glob(f"{name}/*") if path.suffix != ".lock"]
    return sorted(str(path) for path in (*inner, *artifacts.parent.rglob(".*.[0-9]*")))


@dataclass(frozen=True)
class Fault:
    """What went wrong in one attempt of a walk."""

    kind: str
    at: int
    status: int


def walk(
    driver: Driver, overrides: list[str], root: Path, kinds: tuple[str, ...], reach: int, draw: random.Random
) -> list[Fault]:
    """Repeat a command, each time with a fault at one of its next `reach` operations on files, until it finishes.

    Return the faults that struck. AssertionError where an attempt ends in anything but its kill or one clear line, or
    where 200 attempts were not enough.
    """
    struck: list[Fault] = []
    for _ in range(200):
        kind, at = draw.choice(kinds), draw.randint(1, reach)
        outcome = driver.run(overrides, root, kind, at)
        where = f"{kind} at operation {at}: {outcome.status}\n{outcome.output[-3000:]}"
        assert "Traceback" not in outcome.output, where
        if outcome.status == 0:
            return struck
        assert outcome.status == (-signal.SIGKILL if kind in ("kill", "after") else 2), where
        errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
        assert outcome.status != 2 or len(errors) == 1, where
        struck.append(Fault(kind, at, outcome.status))
        reach += reach // 8  # every attempt begins with what those before it finished
    raise AssertionError(f"not finished after {len(struck)} faults")


def available() -> bool:
    """Return whether faults can be injected here: Linux with a C compiler."""
    return sys.platform == "linux" and os.name == "posix" and bool(shutil.which("cc") or shutil.which("gcc"))
