"""depth: the layers that stay, chosen by the measured loss of the model without the others."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.perplexity import tally
from pipeline.prune.measure import only_layers
from pipeline.runtime.checkpoint import load_model, open_checkpoint
from pipeline.search.budgets import greedy_depth

MAKES = "depth"
NEEDS = ("teacher", "tokens", "shape")
EVERY_RANK = True


def needed(config: Config) -> bool:
    """Whether layers go by measured loss."""
    return config.plan.depth == "loss"


def settings(config: Config) -> dict:
    """Give the number of tokens, the layers that must stay, the batches, and the seed that orders the text."""
    plan = config.plan
    return {
        "tokens": plan.depth_tokens,
        "keep_first": plan.keep_first,
        "batch": config.score.batch,
        "seed": config.seed,
    }


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write depth.json: the layers `kept`, their `loss` in nats per token, and every choice `tried` with its loss."""
    device, ranks = machine.device, machine.ranks
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    model = load_model(inputs["teacher"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    model = model.to(device.torch)
    text = Packed(inputs["tokens"] / "calibration")
    asked = config.plan
    batches = beginning(text, asked.depth_tokens, config.score.batch, ranks.rank, ranks.world, config.seed)
    total = len(anatomy.sizes.layers)
    count = json.loads((inputs["shape"] / "shape.json").read_text())["layers"]
    trials = sum(left - asked.keep_first for left in range(total, count, -1))
    bar = machine.progress(range(trials), trials, "depth")

    def loss(kept: tuple[int, ...]) -> float:
        with only_layers(model, total, kept):
            sums = tally(model, batches, config.evaluate.chunk)
        ranks.sum_([sums])
        next(bar, None)
        return float(sums[0] / sums[2])

    found = greedy_depth(total, count, loss, asked.keep_first)
    if ranks.rank == 0:
        tried = [{"kept": kept, "loss": value} for kept, value in found.tried]
        (out / "depth.json").write_text(json.dumps({"kept": found.kept, "loss": found.loss, "tried": tried}))
    machine.say(f"depth: {len(found.tried)} choices of layers measured, loss {found.loss:.3f}")
