"""local_distill: layer-wise distillation of the FFNs: each is trained to bring the residual stream to the teacher's."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.distill.layer_errors import LayerError, LayerErrors
from pipeline.distill.local import HELD_OUT, Lessons, Rows, is_matrix, learn
from pipeline.model.blueprint import Blueprint
from pipeline.model.causal import decoder_of
from pipeline.prune.passes.branches import Branch
from pipeline.prune.passes.layerwise import FfnTarget, in_step
from pipeline.runtime.checkpoint import Checkpoint, open_checkpoint, open_tensors
from pipeline.runtime.checkpoint_writer import write_checkpoint, write_tensors
from pipeline.runtime.class_parameters import ClassParameters
from pipeline.runtime.device import Device
from pipeline.runtime.disk import need_space
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.runtime.ranks import Ranks
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage

# The teacher is the rotated model where the student was cut from that. In later rounds it is still the model that the
# first round began with, and not the student of the round before.
TRAINED = "trained"  # folder with the matrices of each trained layer, until the student is written
LEDGER = "layers.jsonl"  # in it, the errors of these layers
STREAMS = 8  # copies of the hidden states of the text that exist at once


def enabled(config: Config) -> bool:
    """Return whether FFNs are distilled before recovery."""
    return config.local_distill.epochs > 0


def check(config: Config) -> None:
    """Refuse text too short to hold out a part of it, and layers in which an FFN cannot be trained alone."""
    tokens = config.local_distill.tokens
    if enabled(config) and tokens < HELD_OUT:
        raise ValueError(
            f"local_distill.tokens: {tokens}, and one token in {HELD_OUT} is held out; set it to some thousands"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle) if enabled(config) else None
    if folder is None:
        return
    family = open_checkpoint(folder, config.model.allow_pickle).anatomy.family
    if family.residual_weights:
        raise ValueError(
            f"local_distill.epochs: layers of model_type {family.model_type!r} multiply the residual stream by learned "
            "weights, so its FFNs cannot be trained one by one; set it to 0"
        )


def settings(config: Config) -> dict[str, Any]:
    """Return the local_distill section, and the seed that orders the text."""
    return {"local_distill": config.local_distill.model_dump(), "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the student with the trained FFNs, and local_distill.json with the error of each layer.

    Every rank reads its share of the text. Memory: teacher and student on the host, with two residual streams of the
    text, three where attention and FFN read the same one; on the device a layer and a batch, then an FFN (all experts)
    in float32 with its gradients, moments, first values and a copy in the type computed in, and as many rows [h] for
    every token.
    """
    ranks, device, section = machine.ranks, machine.device, config.local_distill
    origin = checkpoint(config, inputs.get("rotated", inputs["teacher"]))
    start = checkpoint(config, inputs["initial_student"])
    need_space(out, 3 * start.bytes())  # the student, and until it is written its FFNs in float32
    blueprint = Blueprint.load(inputs["blueprint"])  # of all rounds so far
    models = [load(each.folder, machine) for each in (origin, start)]
    teacher, student = ((decoder_of(model), each.anatomy) for model, each in zip(models, (origin, start)))
    parameters = ClassParameters(models[1], start)
    batches = calibration(config, inputs, section.tokens, ranks)
    sequence = batches.packed.sequence
    lessons = Lessons(section.epochs, section.batch_tokens, section.learning_rate, config.seed, device.compute_dtype)
    if _fits(origin, start, len(batches) * config.calibration.batch_size * sequence, device):
        for model, _ in (teacher, student):
            model.to(device.torch)
    trained = out / TRAINED
    if ranks.rank == 0:
        trained.mkdir(exist_ok=True)
    ledger = Ledger(trained / LEDGER, LayerError, ranks)
    done = {entry.layer for entry in ledger.entries}
    hosts = [plan.host for plan in blueprint.layers]
    passes = in_step(teacher, student, hosts, blueprint.channels, batches, device.torch)
    changed: dict[str, Tensor] = {}
    for layer in machine.progress(range(len(hosts)), len(hosts), "local_distill"):
        branch, rows = _placed(next(passes), sequence, device, ranks)
        matrices: dict[str, nn.Parameter] = {}
        if branch is not None:
            matrices = _matrices(branch, parameters, student[1].family.prefix.format(layer=layer))
            if layer in done:
                _restore(trained, matrices, ranks)
            else:
                own = replace(lessons, kept=branch.types)
                result = learn(branch.to(device.torch), rows, own, ranks.sum_)
                branch.cpu()
                if ranks.rank == 0:
                    _write(trained / f"{layer}.safetensors", matrices)
                ledger.append(LayerError(layer, result.before, result.after))
            for name, matrix in matrices.items():
                parts = parameters.split(name, matrix.detach()).items()
                changed |= {stored: part.to(start[stored].dtype) for stored, part in parts}
        del branch, rows, matrices  # free before those of the next layer exist
    errors = LayerErrors(tuple(ledger.entries))
    if ranks.rank == 0:
        stream = ((name, changed.get(name, start[name])) for name in start)
        write_checkpoint(out, start.config, stream, config.checkpoint.shard_bytes, inputs["initial_student"])
        errors.save(out)
        shutil.rmtree(trained)
    before, after = errors.means()
    machine.say(
        f"local_distill: {len(errors.layers)} FFNs trained, mean distance from the teacher's residual stream "
        f"{before:.4f} before, {after:.4f} after"
    )


def _fits(origin: Checkpoint, start: Checkpoint, tokens: int, device: Device) -> bool:
    """Return whether both models and the hidden states of so many tokens leave half of the device free."""
    width = origin.anatomy.sizes.hidden
    streams = STREAMS * tokens * width * device.compute_dtype.itemsize
    return origin.bytes() + start.bytes() + streams < 0.5 * device.total_memory()


def _placed(target: FfnTarget, sequence: int, device: Device, ranks: Ranks) -> tuple[Branch | None, Rows]:
    """Return a layer's branch in float32, and this rank's rows on the device, with their places: sequence s of rank r
    is sequence s · world + r of the text."""
    count = len(target.read)
    own = torch.arange(count // sequence) * ranks.world + ranks.rank
    places = (own[:, None] * sequence + torch.arange(sequence)).flatten()
    total = torch.tensor([count])
    ranks.sum_([total])
    read = target.read.to(device.torch)
    base = read if target.base is target.read else target.base.to(device.torch)
    rows = Rows(read, base, target.wanted.to(device.torch), places, int(total))
    return target.branch if target.branch is None else target.branch.float(), rows


def _matrices(branch: Branch, parameters: ClassParameters, prefix: str) -> dict[str, nn.Parameter]:
    """Return the matrices of a branch by their names in the class, `prefix` being the layer's.

    Their values are those of the checkpoint, not rounded to the type that the student computes in.
    """
    named = branch.layer.named_parameters()
    matrices = {f"{prefix}{name}": weight for name, weight in named if is_matrix(name, weight)}
    for name, weight in matrices.items():
        weight.data.copy_(parameters[name])
    return matrices


def _write(path: Path, matrices: Mapping[str, nn.Parameter]) -> None:
    """Write the matrices of a trained layer; the file appears whole."""
    partial = path.with_suffix(".partial")
    write_tensors(partial, {name: weight.detach() for name, weight in matrices.items()})
    os.replace(partial, path)


def _restore(trained: Path, matrices: Mapping[str, nn.Parameter], ranks: Ranks) -> None:
    """Copy the matrices that an interrupted attempt wrote, on all ranks."""
    stored = open_tensors(trained) if ranks.rank == 0 else {}
    for name, weight in matrices.items():
        if ranks.rank == 0:
            weight.data.copy_(stored[name])
        else:
            weight.data.zero_()
    ranks.sum_([weight.data for weight in matrices.values()])


STAGE = Stage(
    name="local_distill",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("teacher", "initial_student", "tokens", "blueprint"),
    optional=("rotated",),
    enabled=enabled,
    check=check,
    revision=2,
    resumable=True,  # the matrices of every trained layer are on disk
    shows={"initial_student": "", "local_distill.json": LayerErrors.FILE},
)
