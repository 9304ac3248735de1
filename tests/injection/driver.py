"""Run the pipeline again and again in children of one process, each with one injected fault.

Started by `Driver` with faulty.c preloaded. Reads one JSON object a line: `overrides`, `log`, `root`, `kind`, `at` (see
faulty.c) and `seconds` (null, or when to kill the child). Answers with one: `status` (exit code, or minus the signal),
`operations` (how many there were; null for a killed child) and `seconds`. The export's proof in a fresh process, which
takes seconds and writes nothing, is left out.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from functools import cache

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline import runner
from pipeline.config import Config, validate
from pipeline.runtime.ranks import PeerFailed
from pipeline.stages.deliver import export
from tests.tiny_text import CONF


@cache
def configuration(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(OmegaConf.to_container(compose("config", [*overrides]), resolve=True))


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
    export.prove = lambda *_: {"class": "not read", "generated": 0, "difference": 0.0}
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)
