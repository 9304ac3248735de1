"""sequential: heads and neurons are removed layer by layer, each solved for the inputs that the pruned layers give."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model.causal import decoder_of
from pipeline.model.scores import Scores
from pipeline.model.shape import Shape
from pipeline.prune.plan import layers_that_stay
from pipeline.prune.second_order.hessian import projections, with_float64
from pipeline.prune.second_order.narrow import LOCAL_ORDERS, Narrowed, narrow_heads, narrow_units
from pipeline.prune.second_order.sequential import prune_in_sequence
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Return whether units are removed layer by layer, at the widths of the shape."""
    return config.restore.sequential


def check(config: Config) -> None:
    """Refuse widths that are not those of the shape."""
    if enabled(config) and config.plan.widths != "uniform":
        raise ValueError(
            f"restore.sequential: narrows all layers alike, and plan.widths={config.plan.widths} does not; set "
            "plan.widths=uniform, or restore.sequential=false"
        )


def settings(config: Config) -> dict[str, Any]:
    """Return how units are ranked and solved, on which text, and which layers stay."""
    return {
        "restore": config.restore.model_dump(include={"local", "at_once", "damping", "tokens"}),
        "depth": config.plan.policy["depth"],
        "keep_first": config.plan.keep_first,
        "seed": config.seed,
    }


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the subject with W_O and W_down solved for the units that stay, the columns of all others zero.

    Beside it scores by which plan keeps exactly these units. Rank 0 solves, all ranks measure. Memory: on the device a
    layer, a batch and its Hessian; beside the model the residual stream of all tokens.
    """
    device, ranks, restore = machine.device, machine.ranks, config.restore
    source = checkpoint(config, inputs["subject"])
    need_space(out, source.bytes())
    anatomy, place = source.anatomy, with_float64(device.torch)
    widest = Shape.load(inputs["shape"]).widest
    scores = Scores.load(inputs["scores"])
    kept = layers_that_stay(inputs, anatomy, scores.layers, config.plan.policy)
    heads, neurons = list(scores.heads), list(scores.neurons)
    modules = projections(anatomy).items()
    sites = {module.format(layer=layer): (axis, layer) for layer in kept for axis, module in modules}

    def narrowed(name: str, hessian: Tensor) -> Narrowed:
        axis, layer = sites[name]
        weight, whole = source[f"{name}.weight"].to(place), anatomy.sizes.layers[layer]
        target = widest.within(whole)
        if axis == "f":
            return narrow_units(weight, hessian, 1, target.neurons, restore.local, restore.at_once, restore.damping)
        return narrow_heads(weight, hessian, anatomy.sizes.head_size, whole, target, restore.local, restore.damping)

    def prune(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        axis, layer = sites[name]
        ranks.sum_([hessian])
        solved = torch.zeros(weight.shape, dtype=torch.float64, device=hessian.device)
        if ranks.rank == 0:
            result = narrowed(name, hessian)
            (neurons if axis == "f" else heads)[layer] = result.scores
            solved.copy_(result.weight)
        ranks.sum_([solved])
        return solved

    model = load(inputs["subject"], machine)
    batches = list(calibration(config, inputs, restore.tokens, ranks))
    passes = prune_in_sequence(decoder_of(model), anatomy, batches, prune, device.torch, kept)
    changed = {
        name: weight.to("cpu", source[name].dtype)
        for name, weight in machine.progress(passes, len(sites), "sequential")
    }
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        stream = ((name, changed[name] if name in changed else source[name]) for name in source)
        write_checkpoint(out, source.config, stream, config.checkpoint.shard_bytes, inputs["subject"])
        scores.with_units(heads, neurons).save(out)


STAGE = Stage(
    name="sequential",
    makes="restored",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores", "shape"),
    optional=("depth",),
    becomes=("subject",),
    enabled=enabled,
    choices={"restore.local": LOCAL_ORDERS},
    check=check,
    shows={"restored": ""},
)
