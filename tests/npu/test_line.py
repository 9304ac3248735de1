"""The whole pipeline on the simulated NPU: every stage runs there, and computes what it computes on the CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.world import environment, losses, make_world, pipeline, settings

RUN = Path(__file__).with_name("run.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="building the simulated NPU needs g++"),
]


def on_npu(*arguments: str, cwd: Path, ranks: int = 1, **variables: str) -> str:
    """Run the pipeline as tests/npu/run.py, `variables` in its environment; return its output."""
    start = [sys.executable, str(RUN)]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start = [*torchrun, str(RUN)]
    done = subprocess.run(
        [*start, *arguments], cwd=cwd, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(arguments)}\nexit {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def errors(artifacts: Path) -> torch.Tensor:
    """Return the distance of every FFN before and after its training [layer, 2]."""
    (folder,) = artifacts.glob("local_distill-*")
    layers = json.loads((folder / "local_distill.json").read_text())["layers"]
    return torch.tensor([[row["before"], row["after"]] for row in layers])


def test_the_line_on_two_npus_under_zero_3_computes_what_one_cpu_computes(tmp_path):
    world = make_world(tmp_path, "glm4")  # sandwich norms, so that every stage has work
    chosen = dict(artifacts=world / "on-npu", device="npu", distill__micro_batch_size=4)
    learn = ("local_distill.epochs=2", "local_distill.tokens=1024", "local_distill.batch_tokens=64")
    on_npu("run=npu", *settings(world, **chosen), *learn, "deepspeed=zero3", cwd=world, ranks=2)
    record = json.loads((world / "runs/npu/run.json").read_text())
    assert record["device"] == "Simulated NPU"
    assert (world / "runs/npu/report.html").exists()

    # One CPU scores and lets FFNs learn again, and recovers again from the same start in float32: the steps of ZeRO-3
    # on two NPUs.
    again = shutil.ignore_patterns("importance-*", "local_distill-*", "distill-*")
    shutil.copytree(world / "on-npu", world / "on-cpu", ignore=again, symlinks=True)
    chosen = dict(artifacts=world / "on-cpu", distill__micro_batch_size=8)
    pipeline("run=cpu", *settings(world, **chosen), *learn, "stages=[importance,local_distill,distill]", cwd=world)
    npu, cpu = (load_file(world / "runs" / run / "scores/scores.safetensors") for run in ("npu", "cpu"))
    assert npu.keys() == cpu.keys()
    for name in npu:  # both in their compute type, which may be bfloat16
        torch.testing.assert_close(npu[name], cpu[name], rtol=5e-2, atol=1e-6, msg=name)
    npu, cpu = (errors(world / where) for where in ("on-npu", "on-cpu"))
    assert (npu[:, 1] < npu[:, 0]).all()
    torch.testing.assert_close(npu, cpu, rtol=5e-2, atol=1e-6)
    npu, cpu = (torch.tensor(losses(world / where)) for where in ("on-npu", "on-cpu"))
    assert len(npu) == 8
    torch.testing.assert_close(npu, cpu, rtol=1e-4, atol=1e-6)


def test_ffns_learn_the_same_where_the_models_do_not_fit_on_the_npu(tmp_path):
    world = make_world(tmp_path, "glm4")
    learn = (
        "local_distill.epochs=2",
        "local_distill.tokens=1024",
        "local_distill.batch_tokens=64",
        "stages=[importance,shape,layer_loss,plan,cut,local_distill]",
    )
    result = {}
    for name, memory in (("whole", 64 << 30), ("by-layer", 1 << 10)):
        chosen = settings(world, artifacts=world / name, device="npu")
        on_npu(f"run={name}", *chosen, *learn, cwd=world, SIMULATED_NPU_MEMORY=str(memory))
        result[name] = errors(world / name)
    assert (result["whole"][:, 1] < result["whole"][:, 0]).all()
    torch.testing.assert_close(result["whole"], result["by-layer"], rtol=1e-6, atol=0)


def test_where_no_chip_is_chosen_the_student_is_made_for_the_npu_found(tmp_path):
    world = make_world(tmp_path, "llama")
    said = on_npu("run=dry", *settings(world, device="auto"), "dry_run=true", cwd=world)
    assert "chip model: 910B3 stands in for Simulated NPU" in said
    assert "910B3" in said.partition("chip model:")[2]
