"""Run the pipeline again and again on two ranks, children of one process, and kill one of them inside a stage.

Started by `RankDriver`. Reads one JSON object a line: `overrides`, `log`, and the death: `rank`, `stage` (None: nobody
dies) and `at`, the call of this program's functions inside that stage before which the rank is killed; at the end of
the stage where it makes fewer calls. Answers with one: `status` and `calls` of each rank (exit code or minus signal;
calls by stage, null for a killed rank), and `outlived`, the seconds between the end of the first rank and the second.
The fresh process of the export's proof, which takes seconds and writes nothing, is left out.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from pipeline import runner
from pipeline.cli.boundary import PACKAGE, Boundary
from pipeline.runtime.ranks import leave
from pipeline.stages.stage import Stage
from tests.injection.driver import configuration, serve

WORLD = 2
LONGEST = 120.0  # seconds that an attempt may take before its ranks count as hung


class Calls:
    """A profile hook: count the calls of this program's functions in each stage, kill this process at one of them."""

    def __init__(self, stage: str | None, at: int):
        self.stage, self.at, self.count = stage, at, 0
        self.by_stage: dict[str, int] = {}
        self.current: str | None = None

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        if frame.f_code is runner._run_stage.__code__ and event in ("call", "return"):
            self._begin(**frame.f_locals) if event == "call" else self._end(result)
        elif self.current and event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.count += 1
            if self.count == self.at and self.stage == self.current:
                os.kill(os.getpid(), signal.SIGKILL)

    def _begin(self, session: runner.Session, stage: Stage, **_: Any) -> None:
        self.current, self.count = f"{stage.name}/{session.config.recipe.part[0]}", 0

    def _end(self, result: tuple | None) -> None:
        if self.current == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)
        if result is not None and result[0] is not None:  # None where it raised
            self.by_stage[str(self.current)] = self.count
        self.current = None


def child(rank: int, job: dict[str, Any], port: int, answer: int) -> None:
    """Run the pipeline as one rank and leave the process as the command does."""
    log = os.open(f"{job['log']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    calls = Calls(job["stage"] if rank == job["rank"] else None, job["at"])
    sys.setprofile(calls)
    status = 0
    try:
        with Boundary()():
            runner.run(configuration(*job["overrides"]), "rank death")
            leave()
    except SystemExit as end:
        status = int(end.code or 0)
    sys.setprofile(None)
    os.write(answer, json.dumps(calls.by_stage).encode())
    os._exit(status)


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    """Run both ranks until they end; one that outlives the limit is killed and has the status null."""
    configuration(*job["overrides"])  # once, for both
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    sys.stdout.flush()
    pipes, processes = [], []
    for rank in range(WORLD):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            child(rank, job, store.port, writing)
        os.close(writing)
        pipes.append(reading)
        processes.append(process)
    status: dict[int, int | None] = {}
    ends: list[float] = []
    deadline = time.monotonic() + LONGEST
    while len(status) < WORLD:
        for rank, process in enumerate(processes):
            if rank not in status:
                done, raw = os.waitpid(process, os.WNOHANG)
                if done:
                    status[rank] = os.waitstatus_to_exitcode(raw)
                elif time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    status[rank] = None
                else:
                    continue
                ends.append(time.monotonic())
        time.sleep(0.01)
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it had started
    calls = []
    for pipe in pipes:
        with os.fdopen(pipe) as file:
            text = file.read()
        calls.append(json.loads(text) if text else None)
    return {"status": [status[rank] for rank in range(WORLD)], "calls": calls, "outlived": max(ends) - min(ends)}


if __name__ == "__main__":
    serve(attempt)
