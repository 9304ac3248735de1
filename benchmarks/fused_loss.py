"""Peak memory and time of the distillation loss, forward and backward, beside the naive loss that holds all logits.

    python benchmarks/fused_loss.py [--device cpu] [--tokens 2048] [--vocabulary 49152] [--kernels triton] ...

Every variant runs in a process of its own (peaks do not mix), the variants in turn, `--rounds` times; figures are
medians. Peak memory is what the variant adds to its inputs: resident memory on a CPU, allocated memory elsewhere.
Seconds are processor time on a CPU (other work on the machine does not count), elapsed time elsewhere.
Variants: `naive` (F.kl_div on float32 log-softmaxes, autograd), `linear` (pipeline.distill.loss, the pipeline's own, by
the kernel that the table of kernels/fused names for the device), and each of `--kernels`: the same by that kernel.
Losses and gradients of all variants must agree, or the run fails. Writes benchmarks/results/fused_loss-<device>.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from arguments import at_least, described
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pipeline.distill.chunk import method_of  # noqa: E402
from pipeline.distill.loss import linear_distillation  # noqa: E402
from pipeline.runtime.device import missing, open_device  # noqa: E402

AGREE = 0.02  # largest relative difference of losses and gradient norms: products are in bfloat16


def naive(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, a) -> Tensor:
    student = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def linear(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, a) -> Tensor:
    kernel = "auto" if a.variant == "linear" else a.variant
    return linear_distillation(
        hidden, weight, teacher_hidden, teacher_weight, kind="forward_kl", beta=0.5, temperature=1.0,
        cross_entropy=0.0, labels=None, chunk=a.chunk, kernel=kernel,
    )[0]  # fmt: skip


def measure(a: argparse.Namespace) -> dict:
    """One forward and backward pass of one variant, after a smaller one that warms up."""
    device = open_device(a.device, "auto", deterministic=False, local_rank=0, seed=0)
    make = {"dtype": torch.bfloat16, "device": device.torch}
    weight = torch.randn(a.vocabulary, a.student, **make).mul_(0.02)
    teacher_weight = torch.randn(a.vocabulary, a.teacher, **make).mul_(0.02)
    hidden, teacher_hidden = torch.randn(a.tokens, a.student, **make), torch.randn(a.tokens, a.teacher, **make)
    hidden.mul_(3), teacher_hidden.mul_(3)
    loss_of = naive if a.variant == "naive" else linear

    def once(tokens: int) -> tuple[float, float, float]:
        inputs = hidden[:tokens].clone().requires_grad_(), weight.requires_grad_()
        weight.grad = None
        device.synchronise()
        clock = time.process_time if device.kind == "cpu" else time.perf_counter
        began = clock()
        loss = loss_of(*inputs, teacher_hidden[:tokens], teacher_weight, a)
        loss.backward()
        device.synchronise()
        return clock() - began, loss.item(), inputs[0].grad.norm().item() + weight.grad.norm().item()

    once(min(64, a.tokens))
    device.reset_peak_memory()
    before = device.peak_memory()
    seconds, loss, gradient = once(a.tokens)
    return {
        "variant": a.variant, "seconds": seconds, "peak_bytes": device.peak_memory() - before, "loss": loss,
        "gradient": gradient, "device": device.name,
    }  # fmt: skip


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu")
    parser.add_argument("--tokens", type=at_least(1), default=2048)
    parser.add_argument("--vocabulary", type=at_least(1), default=49152)
    parser.add_argument("--student", type=at_least(1), default=448)
    parser.add_argument("--teacher", type=at_least(1), default=576)
    parser.add_argument("--chunk", type=at_least(1), default=1024)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--kernels", nargs="*", choices=("autograd", "reference", "triton"), default=[])
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if fault := missing(a.device):
        parser.error(f"--device: {a.device} cannot run here: {fault}; or choose cpu")
    for kernel in a.kernels:
        try:
            method_of("forward_kl", kernel, a.device)
        except ValueError as fault:
            parser.error(f"--kernels: {fault}")
    if a.variant:
        print(json.dumps(measure(a)))
        return
    variants, runs = ["naive", "linear", *a.kernels], []
    for _ in range(a.rounds):
        for variant in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print("{variant:10} {seconds:8.3f} s {0:9.1f} MiB".format(runs[-1]["peak_bytes"] / 2**20, **runs[-1]))
    for key in ("loss", "gradient"):
        values = [run[key] for run in runs]
        if max(values) - min(values) > AGREE * max(values):
            raise SystemExit(f"the variants disagree on the {key}: {sorted(set(values))}")
    report = {key: value for key, value in vars(a).items() if key != "variant"}
    report |= {"device_name": runs[0]["device"], "torch": torch.__version__, "threads": torch.get_num_threads()}
    for variant in variants:
        own = [run for run in runs if run["variant"] == variant]
        seconds, peak = (statistics.median(run[key] for run in own) for key in ("seconds", "peak_bytes"))
        report[variant] = {"seconds": seconds, "peak_bytes": peak}
        print(f"{variant:10} median {seconds:.3f} s, {peak / 2**20:.0f} MiB")
    path = ROOT / "benchmarks/results" / f"fused_loss-{a.device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
