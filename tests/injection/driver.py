"""Run the pipeline again and again in children of one process, each with one injected fault.

Started by `Driver` with faulty.c preloaded. Reads one JSON object a line: `overrides`, `log`, `root`, `kind`, `at` (see
faulty.c) and `seconds` (null, or when to kill the child). Answers with one: `status` (exit code, or minus the signal),
`operations` (how many there were; null for a killed child) and `seconds`. The fresh process of
the export's proof, which takes seconds and writes nothing, is left out.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline import runner
from pipeline.config import Config, validate
from pipeline.runtime.ranks import PeerFailed
from tests.tiny_text import CONF

STAND_IN = """#!/bin/sh
cp "$(dirname "$0")/logits.pt" "$7"
echo '{"class": "not read", "generated": 0}'
"""


@cache
def configuration(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [*overrides, "export.tolerance=2"])  # the logits of `without_proof` are zero
        return validate(OmegaConf.to_container(composed, resolve=True))


@contextmanager
def without_proof() -> Iterator[None]:
    """Within the block, a stand-in answers in place of the fresh interpreter in which an export is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.zeros(1, 1), Path(folder) / "logits.pt")
        stand_in = Path(folder) / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o700)
        sys.executable = str(stand_in)
        yield


def serve(attempt: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each line of standard input with that of an attempt."""
    with without_proof():
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(attempt(json.loads(line))), flush=True)


def child(job: dict, config: Config, answer: int) -> None:
    """Run the pipeline and leave the process: with 0, 2 for a clear error, 1 for a traceback."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    library = ctypes.CDLL(None)
    library.arm(os.fsencode(job["root"]), job["kind"].encode(), ctypes.c_long(job["at"]))
    code = 0
    try:
        runner.run(config, "injection")
    except (ValueError, OSError, FloatingPointError, PeerFailed) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    library.counted.restype = ctypes.c_long
    os.write(answer, str(library.counted()).encode())
    os._exit(code)


def attempt(job: dict) -> dict:
    config = configuration(*job["overrides"])
    reading, writing = os.pipe()
    begin = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(job, config, writing)
    os.close(writing)
    status = None
    while status is None:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        elif job["seconds"] is not None and time.monotonic() - begin > job["seconds"]:
            os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the child had started
    text = os.read(reading, 100).decode()
    os.close(reading)
    return {"status": status, "operations": int(text) if text else None, "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    serve(attempt)
