"""The simulated NPU fails what would fail on a real one: one line of the source is broken, and the line does not run.

On a CPU the last two of these faults go unnoticed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sabotage.py")
CAUGHT = {
    "a hard-coded device": r"engine\.py.*Torch not compiled with CUDA enabled|engine\.py.*device",
    "a missing .to": r"found at least two devices, npu:0 and cpu",
    "a tensor made on the CPU": r"next_tokens.*found at least two devices, npu:0 and cpu",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="building the simulated NPU needs g++"),
]


@pytest.fixture(scope="module")
def runs():
    ran = subprocess.run(
        [sys.executable, str(SCRIPT)], env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_source_as_it_is_runs(runs):
    assert runs["sound"]["exit"] == 0, runs["sound"]["said"]
    assert "distill: step 2/2" in runs["sound"]["said"]


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_broken_line_is_caught(runs, fault):
    assert runs[fault]["exit"] != 0
    assert re.search(CAUGHT[fault], runs[fault]["said"], re.DOTALL), runs[fault]["said"]


def test_every_fault_is_looked_for(runs):
    assert set(runs) == {"sound", *CAUGHT}
