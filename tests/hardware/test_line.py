"""The whole pipeline on an accelerator, an NPU where there is one, else a GPU: every stage runs there and computes
what it computes on the CPU. On an NPU no operator may fall back to the CPU."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pipeline.runtime.device import chip_name, missing
from tests.world import environment, losses, make_world, pipeline, settings

KIND = next((kind for kind in ("npu", "cuda") if missing(kind) is None), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(KIND is None, reason="there is neither an NPU nor a GPU"),
]
LEARN = ("local_distill.epochs=2", "local_distill.tokens=1024", "local_distill.batch_tokens=64")
STEPS = 100


@pytest.fixture(autouse=True)
def on_the_chip(monkeypatch):
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_line_on_an_accelerator_computes_what_the_cpu_computes(tmp_path, zero):
    world = make_world(tmp_path, "glm4")  # sandwich norms, so that every stage has work
    pipeline("run=chip", *settings(world, device=KIND), *LEARN, f"deepspeed={zero}", cwd=world)
    record = json.loads((world / "runs/chip/run.json").read_text())
    assert record["device"] == chip_name(KIND, 0)
    assert (world / "runs/chip/report.html").exists()

    # The CPU scores again, and recovers again from the same start.
    again = shutil.ignore_patterns("importance-*", "distill-*")
    shutil.copytree(world / "artifacts", world / "on-cpu", ignore=again, symlinks=True)
    chosen = settings(world, artifacts=world / "on-cpu")
    pipeline("run=cpu", *chosen, *LEARN, f"deepspeed={zero}", "stages=[importance,distill]", cwd=world)
    chip, cpu = (load_file(world / "runs" / run / "scores/scores.safetensors") for run in ("chip", "cpu"))
    assert chip.keys() == cpu.keys()
    for name in chip:  # both in their compute type, which may be bfloat16
        torch.testing.assert_close(chip[name], cpu[name], rtol=5e-2, atol=1e-6, msg=name)
    chip, cpu = losses(world / "artifacts"), losses(world / "on-cpu")
    assert len(chip) == 8
    assert chip == pytest.approx(cpu, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recovery_cut_off_on_an_accelerator_goes_on_digit_for_digit(tmp_path, precision):
    world = make_world(tmp_path)
    chosen = {
        "device": KIND, "device__deterministic": True, "distill__precision": precision,
        "distill__tokens": STEPS * 8 * 32, "distill__micro_batch_size": 8,
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
    assert "distill: resumes after step" in said
    assert losses(again) == losses(world / "artifacts")
    straight, resumed = (load_file(world / "runs" / run / "student/model.safetensors") for run in ("straight", "again"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
