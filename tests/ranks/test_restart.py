"""launch/local.sh --max-restarts: a killed process is started again with the others, and the run resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.world import ROOT, environment, make_world, settings

STEPS = 24


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_recovery_goes_on_from_its_checkpoint(tmp_path):
    world = make_world(tmp_path)
    chosen = settings(world, distill__micro_batch_size=4, distill__tokens=STEPS * 8 * 32, device__timeout=60)
    result = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(ROOT / "launch/local.sh"), "--nproc-per-node", "2", "--max-restarts", "1"]
    with (world / "log").open("w") as log:
        run = subprocess.Popen(
            [*command, *chosen, "run=again", "stages=[importance,shape,plan,cut,distill]"],
            cwd=world, env=result, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        for _ in range(1200):  # until the recovery has left its first checkpoint
            if list((world / "artifacts/.partial").glob("distill-*/checkpoints/step-*")):
                break
            assert run.poll() is None, (world / "log").read_text()
            time.sleep(0.1)
        ranks = {child.environ()["RANK"]: child for child in psutil.Process(run.pid).children()}
        ranks["1"].send_signal(signal.SIGKILL)
        assert run.wait(300) == 0, (world / "log").read_text()
    finally:
        run.kill()
    assert "distill: resumes after step" in (world / "log").read_text()
    (folder,) = (world / "artifacts").glob("distill-*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
