"""Aligned widths against unaligned ones of as many parameters: predicted for an NPU, and measured on this CPU.

    python benchmarks/aligned_widths.py [--rounds 30] [--threads 1] [--chip 910B1] [--smoke]

A decoder layer's seven matrix products (q, k, v, o, gate, up, down), as transformers computes them, in bfloat16: in
prefill (512 rows) and in decoding (16 rows). Each aligned layer is compared with layers whose hidden channels or
neurons are no multiple of the tile; where the channels change, the neurons compensate, so that parameters are
equal.
Times are given per weight, relative to the aligned layer. Predicted: `pipeline.costmodel.gemm`, weights in the chip's
tiled format and row by row, as plain torch keeps them. Measured: passes over several layers' weights, the shapes in
turn, in another order every round; the figure is the median over rounds of the ratio within a round. It needs a quiet
machine and, with the defaults, three minutes.
Writes benchmarks/results/aligned_widths.md and .json.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import at_least, described
from composing import composed

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pipeline.costmodel.chip import Chip  # noqa: E402
from pipeline.costmodel.gemm import gemm_seconds  # noqa: E402
from pipeline.runtime.device import open_device  # noqa: E402

PHASES = {"prefill": 512, "decoding": 16}  # rows of a product
COLD = 48 << 20  # bytes of weights that one measured pass reads at least, unless a pass gets too long
LONG = 2e10  # multiply-accumulates of one measured pass, at most


@dataclass(frozen=True)
class Layer:
    """The widths of a decoder layer."""

    hidden: int
    neurons: int
    heads: int
    groups: int
    head_size: int

    def products(self) -> list[tuple[int, int]]:
        """(n, k) of q, k, v, o, gate, up and down."""
        h, f, q, kv = self.hidden, self.neurons, self.heads * self.head_size, self.groups * self.head_size
        return [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)]

    def parameters(self) -> int:
        return sum(n * k for n, k in self.products())

    def as_large(self, hidden: int) -> "Layer":
        """Other channels, and the neurons that keep the parameters."""
        attention = 2 * (self.heads + self.groups) * self.head_size
        return self.resized(hidden, round((self.parameters() / hidden - attention) / 3))

    def resized(self, hidden: int, neurons: int) -> "Layer":
        return Layer(hidden, neurons, self.heads, self.groups, self.head_size)


ALIGNED = {
    "135M class": Layer(512, 1152, 9, 3, 64),
    "1B class": Layer(2048, 5632, 32, 8, 64),
    "7B class": Layer(4096, 11008, 32, 8, 128),
}
MEASURED = ("135M class", "1B class")  # a layer of the last is beyond a CPU's patience


def beside(layer: Layer) -> list[Layer]:
    """The aligned layer, then the unaligned ones: odd, multiples of 8, of 16, in channels and in neurons."""
    h, f = layer.hidden, layer.neurons
    channels = [layer.as_large(h + step) for step in (-5, 8, 16)]
    return [layer, *channels, *(layer.resized(h, f + step) for step in (-5, 8, 16))]


def chip_named(name: str) -> Chip:
    return Chip(**composed([f"device/chip={name}"])["device"]["chip"])


def predicted(chip: Chip, layer: Layer, rows: int, row_major: bool) -> float:
    return sum(gemm_seconds(chip, rows, n, k, "bf16", row_major=row_major) for n, k in layer.products())


def measure(layers: list[Layer], rows: int, rounds: int) -> list[list[float]]:
    """Seconds of a pass for each round and layer shape."""
    made = []
    for layer in layers:
        macs = rows * layer.parameters()
        copies = max(1, min(-(-COLD // (2 * layer.parameters())), int(LONG / macs)))
        weights = [[torch.randn(n, k).bfloat16() for n, k in layer.products()] for _ in range(copies)]
        inputs = {k: torch.randn(rows, k).bfloat16() for k in {k for _, k in layer.products()}}
        made.append((weights, inputs, copies))
    order, times = list(range(len(layers))), []
    for turn in range(-1, rounds):
        random.Random(turn).shuffle(order)
        seconds = [0.0] * len(layers)
        for place in order:
            weights, inputs, copies = made[place]
            began = time.perf_counter()
            for layer in weights:
                for weight in layer:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            seconds[place] = (time.perf_counter() - began) / copies
        if turn >= 0:  # the first warms up
            times.append(seconds)
    return times


def rows_of(a: argparse.Namespace) -> list[dict]:
    """One row a layer shape and phase: everything relative to the aligned layer, per weight."""
    npu, cpu, found = chip_named(a.chip), chip_named("CPU"), []
    for name, aligned in ALIGNED.items():
        layers = beside(aligned)
        for phase, rows in PHASES.items():
            timed = measure(layers, rows, a.rounds) if name in MEASURED else []
            for place, layer in enumerate(layers):
                size = layer.parameters() / aligned.parameters()

                def relative(chip: Chip, row_major: bool, layer=layer, size=size, rows=rows, aligned=aligned) -> float:
                    return predicted(chip, layer, rows, row_major) / predicted(chip, aligned, rows, row_major) / size

                row = {
                    "model": name, "phase": phase, "hidden": layer.hidden, "neurons": layer.neurons,
                    "aligned": layer == aligned, "parameters": layer.parameters(),
                    f"{a.chip} tiled": relative(npu, False), f"{a.chip} row by row": relative(npu, True),
                    "CPU predicted": relative(cpu, False),
                }  # fmt: skip
                if timed:
                    ratios = [times[place] / times[0] / size for times in timed]
                    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                    row |= {"CPU measured": middle, "CPU quartiles": [low, high]}
                    row["CPU milliseconds"] = 1e3 * statistics.median(times[place] for times in timed)
                found.append(row)
    return found


def table(a: argparse.Namespace, rows: list[dict], facts: dict) -> str:
    """The rows as Markdown, and how often the aligned layer is the fastest per weight."""
    heads = ["model", "phase", "hidden", "neurons", f"{a.chip} tiled", f"{a.chip} row by row", "CPU predicted"]
    lines = [
        "# Aligned widths against unaligned ones of as many parameters",
        "",
        "Time per weight of a layer's seven matrix products; the aligned layer, first of each block, is 1.",
        f"{a.chip}: predicted by the chip model, not run. CPU: {facts['cpu']}, {facts['threads']} thread(s), torch",
        f"{facts['torch']}, bfloat16, median over {facts['rounds']} rounds of the ratio within a round (quartiles).",
        "",
        "| " + " | ".join([*heads, "CPU measured", "ms"]) + " |",
        "|" + "---|" * (len(heads) + 2),
    ]
    for row in rows:
        shown = [f"{row[head]:.3f}" if isinstance(row[head], float) else str(row[head]) for head in heads]
        if "CPU measured" in row:
            low, high = row["CPU quartiles"]
            shown += [f"{row['CPU measured']:.3f} ({low:.3f} to {high:.3f})", f"{row['CPU milliseconds']:.2f}"]
        else:
            shown += ["", ""]
        lines.append("| " + " | ".join(shown) + " |")
    lines.append("")
    for head in (*heads[4:], "CPU measured"):
        others = [row[head] for row in rows if not row["aligned"] and head in row]
        slower = sum(value > 1 for value in others)
        lines.append(
            f"- {head}: the aligned layer is faster per weight than {slower} of {len(others)} unaligned ones, in the "
            f"median by {statistics.median(others) - 1:.1%}, from {min(others) - 1:.1%} to {max(others) - 1:.1%}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    chips = sorted(file.stem for file in (ROOT / "conf/device/chip").glob("*.yaml"))
    parser = described(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=30)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--chip", choices=chips, default="910B1")
    parser.add_argument("--smoke", action="store_true", help="two rounds, nothing written")
    a = parser.parse_args()
    a.rounds = 2 if a.smoke else a.rounds
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    device = open_device("cpu", "auto", deterministic=False, local_rank=0, seed=0)
    began = time.monotonic()
    facts = {"cpu": device.name, "threads": a.threads, "torch": torch.__version__, "rounds": a.rounds}
    facts |= {"system": platform.platform(), "phases": PHASES}
    rows = rows_of(a)
    text = table(a, rows, facts)
    print(text, f"{time.monotonic() - began:.0f} s", sep="\n")
    if not a.smoke:
        results = ROOT / "benchmarks/results"
        (results / "aligned_widths.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        (results / "aligned_widths.md").write_text(text)


if __name__ == "__main__":
    main()
