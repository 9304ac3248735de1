"""obs_order: the order in which heads, KV groups and neurons are removed, by optimal brain surgeon.

The unit removed first is the one whose removal leaves the least output error once the others are restored.
"""

from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.model.scores import Scores
from pipeline.prune.second_order.hessian import need_projections, projections, with_float64
from pipeline.prune.second_order.removal_order import head_order, head_scores, obs_order
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Return whether heads, KV groups and neurons are ranked by optimal brain surgeon."""
    return config.restore.order == "obs"


def settings(config: Config) -> dict:
    """Return the damping and how many neurons a step removes."""
    return {"damping": config.restore.damping, "at_once": config.restore.at_once}


def check(config: Config) -> None:
    """Refuse a teacher, where it is a folder, whose heads or neurons this order cannot choose among."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if enabled(config) and folder is not None:
        anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
        need_projections(anatomy, "restore.order=obs", "restore.order=scores")


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the scores with places in the order of removal instead of the scores of heads and neurons.

    Layers are distributed over ranks. Memory: a few matrices [f, f] in float64.
    """
    ranks, damping = machine.ranks, config.restore.damping
    place = with_float64(machine.device.torch)
    source = checkpoint(config, inputs["subject"])
    need_projections(source.anatomy, "restore.order=obs", "restore.order=scores")
    anatomy, grams = source.anatomy, open_tensors(inputs["hessians"])
    scores = Scores.load(inputs["scores"])
    heads = [torch.zeros(len(each), dtype=torch.float64) for each in scores.heads]
    neurons = [torch.zeros(len(each), dtype=torch.float64) for each in scores.neurons]
    mine = range(ranks.rank, len(heads), ranks.world)
    size, modules = anatomy.sizes.head_size, projections(anatomy)
    for layer in machine.progress(mine, len(mine), "obs order"):
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
        scores.with_units(heads, neurons).save(out)


STAGE = Stage(
    name="obs_order",
    makes="obs_orders",
    run=run,
    settings=settings,
    needs=("subject", "scores", "hessians"),
    enabled=enabled,
    check=check,
)
