"""Run the pipeline on the simulated NPU: `python tests/npu/run.py device=npu ...`, also under torchrun."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from tests.npu.simulated import install  # noqa: E402

if __name__ == "__main__":
    install()
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
