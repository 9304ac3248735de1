"""The whole line on a GPU: every stage runs there, and computes what it computes on the CPU."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.world import environment, losses, make_world, pipeline, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
LEARN = ("blocks.epochs=2", "blocks.tokens=1024", "blocks.batch=64")
STEPS = 100


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_line_on_a_gpu_computes_what_the_cpu_computes(tmp_path, zero):
    world = make_world(tmp_path, "glm4")  # sandwich norms, so that every stage has work
    pipeline("run=gpu", *settings(world, device="cuda"), *LEARN, f"deepspeed={zero}", cwd=world)
    record = json.loads((world / "runs/gpu/run.json").read_text())
    assert record["device"] == torch.cuda.get_device_name()
    assert (world / "runs/gpu/report.html").exists()

    # The CPU scores again, and recovers again from the same start.
    again = shutil.ignore_patterns("score-*", "distill-*")
    shutil.copytree(world / "artifacts", world / "on-cpu", ignore=again, symlinks=True)
    chosen = settings(world, artifacts=world / "on-cpu")
    pipeline("run=cpu", *chosen, *LEARN, f"deepspeed={zero}", "stages=[score,distill]", cwd=world)
    gpu, cpu = (load_file(world / "runs" / run / "scores/scores.safetensors") for run in ("gpu", "cpu"))
    assert gpu.keys() == cpu.keys()
    for name in gpu:  # both in their compute type, which may be bfloat16
        torch.testing.assert_close(gpu[name], cpu[name], rtol=5e-2, atol=1e-6, msg=name)
    gpu, cpu = losses(world / "artifacts"), losses(world / "on-cpu")
    assert len(gpu) == 8
    assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recovery_cut_off_on_a_gpu_goes_on_digit_for_digit(tmp_path, precision):
    world = make_world(tmp_path)
    chosen = {
        "device": "cuda", "device__deterministic": True, "distill__precision": precision,
        "distill__tokens": STEPS * 8 * 32, "distill__micro_batch": 8,
    }  # fmt: skip
    pipeline("run=straight", *settings(world, **chosen), cwd=world)
    again = shutil.copytree(
        world / "artifacts", world / "again", ignore=shutil.ignore_patterns("distill-*", "export-*"), symlinks=True
    )
    command = [sys.executable, "-m", "pipeline", "run=again", *settings(world, artifacts=again, **chosen)]
    with (world / "log").open("w") as log:
        doomed = subprocess.Popen(command, cwd=world, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(12000):  # until the recovery has left a checkpoint
            if list((again / ".partial").glob("distill-*/checkpoints/step-*")):
                break
            assert doomed.poll() is None, (world / "log").read_text()
            time.sleep(0.01)
    finally:
        doomed.kill()
        doomed.wait()
    said = pipeline("run=again", *settings(world, artifacts=again, **chosen), cwd=world).stdout
    assert "distill: goes on after step" in said
    assert losses(again) == losses(world / "artifacts")
    straight, resumed = (load_file(world / "runs" / run / "student/model.safetensors") for run in ("straight", "again"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
