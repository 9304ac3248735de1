"""blocks: every FFN of the student learns, one after another, to bring the student's stream back to the teacher's."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.distill.local import HELD_OUT, Learnt, Lessons, Rows, learn
from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.prune.passes.layerwise import ffn_modules, in_step
from pipeline.runtime.checkpoint import (
    Checkpoint,
    load_model,
    open_checkpoint,
    open_tensors,
    write_checkpoint,
    write_tensors,
)
from pipeline.runtime.disk import need_space
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage

# Source is the teacher in other axes, where the student was cut from it. In later rounds `original` teaches, and
# `teacher` is the student of the round before.
LEARNT = "learnt"  # folder of a folder a layer
PARTIAL = ".partial"
STREAMS = 8  # of the text at once, copies included
ERRORS = "errors"  # tensor [2] beside a layer's matrices


def enabled(config: Config) -> bool:
    """Whether FFNs learn before recovery."""
    return config.local_distill.epochs > 0


def check(config: Config) -> None:
    """Refuse text too short to be measured on what was not learnt from."""
    if enabled(config) and config.local_distill.tokens < HELD_OUT:
        raise ValueError(
            f"local_distill.tokens is {config.local_distill.tokens}, and one token in {HELD_OUT} is held out; "
            "raise it to thousands"
        )


def settings(config: Config) -> dict:
    """Give the text, the lessons, and the seed that orders both."""
    return config.local_distill.model_dump() | {"seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the student with the FFNs that learnt, and blocks.json: a layer's error `before` and `after`.

    The error is the squared distance between the two streams behind the FFN, over the square of the teacher's, a mean
    over held-out tokens. Every rank reads its share of the text. Memory: teacher and student on the host, with two
    streams of the text; on the device a layer and a batch, then an FFN in float32 with its moments and two rows [h] for
    every token.
    """
    ranks, device, trust = machine.ranks, machine.device, config.model.trust_remote_code
    taught_by = inputs.get("rotated", inputs["teacher"])
    origin = open_checkpoint(taught_by, config.model.allow_pickle)
    start = open_checkpoint(inputs["initial_student"])
    need_space(out, 3 * start.bytes())  # the student, and until it is written its FFNs in float32
    blueprint = Blueprint.load(inputs["blueprint"] / "blueprint.json")  # of all rounds so far
    teacher, student = (
        (load_model(each.folder, device.compute_dtype, device.attention, trust).get_decoder(), each.anatomy)
        for each in (origin, start)
    )
    asked = config.local_distill
    batches = calibration(config, inputs, asked.tokens, ranks)
    lessons = Lessons(asked.epochs, asked.batch_tokens, asked.learning_rate, config.seed, device.compute_dtype)
    if _fits(origin, start, len(batches) * config.calibration.batch_size * batches.packed.sequence, device):
        for model, _ in (teacher, student):
            model.to(device.torch)
    hosts, done = [plan.host for plan in blueprint.layers], ranks.share(_done(out) if ranks.rank == 0 else None)
    passes = in_step(teacher, student, hosts, blueprint.channels, batches, device.torch)
    learnt, errors = {}, []
    for layer in machine.progress(range(len(hosts)), len(hosts), "blocks"):
        branch, matrices = _branch(student, start, layer)
        streams = next(passes)[1:]
        if layer in done:
            told = _remembered(out, layer, matrices, ranks)
        else:
            placed = (stream.to(device.torch) for stream in streams)
            told = learn(branch.to(device.torch), _rows(*placed, batches.packed.sequence, ranks), lessons, ranks.sum_)
            branch.cpu()
            if ranks.rank == 0:
                _write(out / LEARNT / str(layer), matrices, told)
        del streams  # free while the next layer's are made
        errors.append({"layer": layer, "before": told.before, "after": told.after})
        learnt |= {name: matrix.detach().to(start[name].dtype) for name, matrix in matrices.items()}
        _take(student, branch, layer)
    if ranks.rank == 0:
        stream = ((name, learnt.get(name, start[name])) for name in start)
        write_checkpoint(out, start.config, stream, config.checkpoint.shard_bytes, inputs["initial_student"])
        (out / "blocks.json").write_text(json.dumps(errors))
        shutil.rmtree(out / LEARNT)
    means = [sum(each[when] for each in errors) / len(errors) for when in ("before", "after")]
    told = f"{means[0]:.4f} before, {means[1]:.4f} after"
    machine.say(f"blocks: {len(errors)} FFNs learnt, mean distance from the teacher's stream {told}")


def _fits(origin: Checkpoint, start: Checkpoint, tokens: int, device) -> bool:
    """Whether both models and the streams of so many tokens leave half of the device free: no copies over the bus."""
    width = origin.anatomy.sizes.hidden
    streams = STREAMS * tokens * width * device.compute_dtype.itemsize
    return origin.bytes() + start.bytes() + streams < 0.5 * device.total_memory()


def _branch(
    student: tuple[nn.Module, Anatomy], start: Checkpoint, layer: int
) -> tuple[nn.Sequential, dict[str, nn.Parameter]]:
    """Give a copy in float32 of what a layer's FFN adds to the stream, norms included, and its matrices by name.

    The matrices are those of the checkpoint, not rounded to the type that the student computes in.
    """
    names = ffn_modules(student[1], layer)
    modules = dict(student[0].named_modules(prefix="model"))
    branch = nn.Sequential(*(deepcopy(modules[name]).float() for name in names))
    matrices = {
        f"{name}.{inner}": weight
        for name, part in zip(names, branch, strict=True)
        for inner, weight in part.named_parameters()
        if weight.dim() > 1
    }
    for name, weight in matrices.items():
        weight.data.copy_(start[name])
    return branch, matrices


def _take(student: tuple[nn.Module, Anatomy], branch: nn.Sequential, layer: int) -> None:
    """Put what a layer's FFN has learnt into the student that the stream goes through."""
    modules = dict(student[0].named_modules(prefix="model"))
    for name, part in zip(ffn_modules(student[1], layer), branch, strict=True):
        modules[name].load_state_dict(part.state_dict())


def _rows(read: Tensor, wanted: Tensor, sequence: int, ranks) -> Rows:
    """Give this rank's rows and their places: sequence s of rank r is the text's s · world + r."""
    own = torch.arange(len(read) // sequence) * ranks.world + ranks.rank
    places = (own[:, None] * sequence + torch.arange(sequence)).flatten()
    total = torch.tensor([len(read)])
    ranks.sum_([total])
    return Rows(read, wanted, places, int(total))


def _done(out: Path) -> list[int]:
    return [int(folder.name) for folder in (out / LEARNT).glob("*") if folder.suffix != PARTIAL]


def _write(folder: Path, matrices: dict[str, nn.Parameter], told: Learnt) -> None:
    """Write down what a layer has learnt; a folder without the mark of a partial one is whole."""
    partial = folder.with_suffix(PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    errors = torch.tensor([told.before, told.after], dtype=torch.float64)
    tensors = {name: weight.detach() for name, weight in matrices.items()} | {ERRORS: errors}
    write_tensors(partial / "learnt.safetensors", tensors)
    os.replace(partial, folder)


def _remembered(out: Path, layer: int, matrices: dict[str, nn.Parameter], ranks) -> Learnt:
    """Give a layer's matrices what they had learnt, on all ranks."""
    errors = torch.zeros(2, dtype=torch.float64)
    whole = {ERRORS: errors} | {name: weight.data for name, weight in matrices.items()}
    known = open_tensors(out / LEARNT / str(layer)) if ranks.rank == 0 else {}
    for name, tensor in whole.items():
        tensor.copy_(known[name]) if known else tensor.zero_()
    ranks.sum_(whole.values())
    return Learnt(*errors.tolist())


STAGE = Stage(
    name="local_distill",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("teacher", "initial_student", "tokens", "blueprint"),
    optional=("rotated",),
    enabled=enabled,
    check=check,
    resumable=True,  # what a layer has learnt is on disk
    shows={"initial_student": "", "blocks.json": "blocks.json"},
)
