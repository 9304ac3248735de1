"""Ranks as real processes: each runs a function of a test module, under the environment that torchrun gives."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runtime.device import open_device
from pipeline.runtime.ranks import join, place
from tests.npu import simulated
from tests.world import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes"])  # torch is imported once, not once a rank


def on_ranks(
    work: Callable,
    folder: Path,
    world: int = 2,
    timeout: float = 20.0,
    arguments: tuple = (),
    kind: str = "cpu",  # an npu is the simulated one
) -> list[Any]:
    """What `work(ranks, *arguments)` returned, raised ("ErrorType: text") or, if its process died, None, per rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    answers = [folder / f"rank{rank}.json" for rank in range(world)]
    processes = []
    for rank, answer in enumerate(answers):
        answer.unlink(missing_ok=True)
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(CONTEXT.Process(target=_rank, args=(work, environment, timeout, answer, arguments, kind)))
        processes[-1].start()
    deadline = time.monotonic() + 240  # also for building the simulated NPU
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
    assert not late, f"ranks {late} hung"
    return [json.loads(answer.read_text()) if answer.exists() else None for answer in answers]


def _rank(work: Callable, environment: dict, timeout: float, answer: Path, arguments: tuple, kind: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kind == "npu":
        simulated.install()
    try:
        value = work(join(open_device(kind, "auto", False, place()[2], 0), timeout), *arguments)
    except Exception as fault:
        value = f"{type(fault).__name__}: {fault}"
    answer.write_text(json.dumps(value))


def launch(world: int, script: Path, *arguments: str) -> None:
    """Run a script of the tests on so many ranks by torchrun, or in one process; it must end with exit code 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), *arguments],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
