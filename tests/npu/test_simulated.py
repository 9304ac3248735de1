"""The simulated NPU computes what the CPU computes, and refuses what a real NPU refuses.

It needs g++ and ninja; every test is a process of its own, since a registered device stays.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="building the simulated NPU needs g++")


def answer(*arguments: str, seconds: int):
    """Return the JSON that a script prints on its last line; its standard error when it fails."""
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def curves():
    return answer(str(HERE / "train.py"), seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama sdpa", "llama eager", "glm4 sdpa", "glm4 eager"])
def test_training_on_the_npu_gives_the_losses_of_the_cpu(curves, model):
    assert curves[model]["npu:0"] == pytest.approx(curves[model]["cpu"], rel=1e-6)
    assert len(set(curves[model]["cpu"])) == 4  # the weights moved


@pytest.mark.slow
def test_zero_1_2_and_3_in_bf16_on_two_npus_agree_and_follow_the_cpu(curves):
    zero = answer(*TWO_RANKS, str(HERE / "zero.py"), "npu", seconds=300)
    assert zero["zero1"] == zero["zero2"] == zero["zero3"]
    steps = len(zero["zero1"])
    assert zero["zero1"] == pytest.approx(curves["llama eager"]["cpu"][:steps], rel=2e-3)  # bf16 beside float32


def test_the_simulated_npu_refuses_what_a_real_one_refuses_and_nothing_else():
    said = answer(str(HERE / "refusals.py"), seconds=300)
    assert [name for name, error in said["refused"].items() if error is None] == []
    assert [name for name, held in said["permitted"].items() if not held] == []


def test_the_layers_of_a_model_on_an_npu_are_computed_by_torch_npus_operators():
    """Calls counted by family: norms, the FFN where gate and up are one projection, queries and keys."""
    facts = answer(str(HERE / "layers.py"), seconds=300)
    assert facts.pop("operators") == ["rms_norm", "rotary", "swiglu_packed"]
    norms = {"llama": 2, "gemma2": 4, "glm4": 4, "phi3": 2, "qwen3": 4}
    for kind, fact in facts.items():
        layers = fact["layers"]
        wanted = {"rms_norm": norms[kind] * layers + 1, "rotary": 2 * layers}
        wanted |= {"swiglu_packed": layers} if kind in ("glm4", "phi3") else {}
        assert fact["calls"] == wanted, kind
        assert fact["gap"] < 1e-3, kind
