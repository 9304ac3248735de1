"""sequence: heads and neurons go layer by layer, each solved for what its pruned predecessors really give it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model.anatomy import LayerSizes
from pipeline.model.scores import Scores
from pipeline.prune.plan import layers_that_stay
from pipeline.prune.second_order.hessian import projections, with_float64
from pipeline.prune.second_order.narrow import Narrowed, narrow_heads, narrow_units
from pipeline.prune.second_order.sequential import prune_in_sequence
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Whether units go layer by layer, at the widths of the shape."""
    return config.restore.sequential


def check(config: Config) -> None:
    """Refuse widths that are not those of the shape."""
    if enabled(config) and config.plan.widths != "uniform":
        raise ValueError(
            f"restore.sequential narrows all layers alike, and plan.widths={config.plan.widths}; choose one"
        )


def settings(config: Config) -> dict:
    """Give how units are chosen and solved, on which text, and which layers stay."""
    asked = config.restore.model_dump(include={"local", "at_once", "damping", "tokens"})
    depth = {"depth": config.plan.policy["depth"], "keep_first": config.plan.keep_first}
    return asked | depth | {"seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the teacher with W_O and W_down solved for the units that stay, the columns of all others zero.

    Beside it scores.safetensors, whose ranks keep just these units in plan, and widths.json. Rank 0 solves, all ranks
    measure. Memory: on the device a layer, a batch and its Gram matrix; beside the model the stream of all tokens.
    """
    device, ranks, asked = machine.device, machine.ranks, config.restore
    source = open_checkpoint(inputs["subject"], config.model.allow_pickle)
    need_space(out, source.bytes())
    anatomy, place = source.anatomy, with_float64(device.torch)
    shape = json.loads((inputs["shape"] / "shape.json").read_text())
    widest = LayerSizes(shape["heads"], shape["groups"], shape["neurons"])
    widths = [widest.within(own) for own in anatomy.sizes.layers]
    scores = Scores.load(inputs["scores"] / "scores.safetensors")
    kept = layers_that_stay(inputs, scores.layers, config.plan.policy)
    heads, neurons = list(scores.heads), list(scores.neurons)
    modules = projections(anatomy).items()
    solved = {module.format(layer=layer): (axis, layer) for layer in kept for axis, module in modules}

    def narrowed(name: str, gram: Tensor) -> Narrowed:
        axis, layer = solved[name]
        weight, whole, wanted = source[f"{name}.weight"].to(place), anatomy.sizes.layers[layer], widths[layer]
        if axis == "f":
            return narrow_units(weight, gram, 1, wanted.neurons, asked.local, asked.at_once, asked.damping)
        return narrow_heads(weight, gram, anatomy.sizes.head_size, whole, wanted, asked.local, asked.damping)

    def prune(name: str, weight: Tensor, gram: Tensor) -> Tensor:
        axis, layer = solved[name]
        ranks.sum_([gram])
        whole = torch.zeros(weight.shape, dtype=torch.float64, device=gram.device)
        if ranks.rank == 0:
            found = narrowed(name, gram)
            (neurons if axis == "f" else heads)[layer] = found.scores
            whole.copy_(found.weight)
        ranks.sum_([whole])
        return whole

    model = load_model(inputs["subject"], device.compute_dtype, device.attention, config.model.trust_remote_code)
    batches = list(calibration(config, inputs, asked.tokens, ranks))
    passes = prune_in_sequence(model.get_decoder(), anatomy, batches, prune, device.torch, kept)
    changed = {
        name: weight.to("cpu", source[name].dtype) for name, weight in machine.progress(passes, len(solved), "sequence")
    }
    if ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        stream = ((name, changed[name] if name in changed else source[name]) for name in source)
        write_checkpoint(out, source.config, stream, config.checkpoint.shard_bytes, inputs["subject"])
        scores.with_units(heads, neurons).save(out / "scores.safetensors")
        (out / "widths.json").write_text(json.dumps([asdict(each) for each in widths]))


STAGE = Stage(
    name="sequential",
    makes="restored",
    run=run,
    settings=settings,
    needs=("subject", "tokens", "scores", "shape"),
    optional=("depth",),
    becomes=("subject",),
    enabled=enabled,
    check=check,
    shows={"restored": ""},
)
