"""order: which heads, KV groups and neurons go first, by the error that stays once the others are restored."""

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.model.scores import Scores
from pipeline.prune.second_order.hessian import projections, with_float64
from pipeline.prune.second_order.removal_order import head_order, head_scores, obs_order
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Whether heads, KV groups and neurons go by optimal brain surgeon."""
    return config.restore.order == "obs"


def settings(config: Config) -> dict:
    """Give the damping and how many neurons go at once."""
    return {"damping": config.restore.damping, "at_once": config.restore.at_once}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write scores.safetensors with ranks of removal in place of the scores of heads and neurons, for every width.

    Ranks of processes take layers in turn; memory: a few matrices [f, f] in float64.
    """
    ranks, damping = machine.ranks, config.restore.damping
    place = with_float64(machine.device.torch)
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    anatomy, grams = source.anatomy, open_tensors(inputs["hessians"])
    scores = Scores.load(inputs["scores"] / "scores.safetensors")
    heads = [torch.zeros(len(each), dtype=torch.float64) for each in scores.heads]
    neurons = [torch.zeros(len(each), dtype=torch.float64) for each in scores.neurons]
    mine = range(ranks.rank, len(heads), ranks.world)
    size, modules = anatomy.sizes.head_size, projections(anatomy)
    for layer in machine.progress(mine, len(mine), "order"):
        attention, ffn = (
            (grams[name].to(place), source[f"{name}.weight"].to(place))
            for name in (modules[axis].format(layer=layer) for axis in ("n d", "f"))
        )
        widths = anatomy.sizes.layers[layer]
        together = size * (widths.heads // widths.groups)
        groups = obs_order(*attention, together, widths.groups, 1, damping)
        heads[layer] = head_scores(groups, head_order(*attention, size, widths.groups, damping))
        neurons[layer] = obs_order(*ffn, 1, widths.neurons, config.restore.at_once, damping).scores()
    ranks.sum_([*heads, *neurons])
    if ranks.rank == 0:
        scores.with_units(heads, neurons).save(out / "scores.safetensors")


STAGE = Stage(
    name="obs_order",
    makes="obs_orders",
    run=run,
    settings=settings,
    needs=("subject", "scores", "hessians"),
    enabled=enabled,
)
