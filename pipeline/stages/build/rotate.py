"""rotate: the subject with its residual stream in its principal basis, as a model folder, to be cut to its first
channels.

A rotation of the stream changes no head, neuron or layer: their scores, Hessians and losses are measured on the model
that is not rotated.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model.causal import decoder_of
from pipeline.model.shape import Shape, StreamEnergy
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.surgery.projector import rotated_tensors
from pipeline.prune.surgery.rotate import (
    check_rotatable,
    principal_basis,
    rotate,
    rotate_tied,
    tied_basis,
    tied_gain,
)
from pipeline.runtime.checkpoint_writer import write_checkpoint, write_wrapper_parts
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Return whether channels are taken from other axes than those of the model itself."""
    return config.rotate.kind != "none"


def needs_also(config: Config) -> tuple[str, ...]:
    """Return the shape where a gain is fitted for the channels that stay."""
    return ("shape",) if config.rotate.tie == "keep" else ()


def settings(config: Config) -> dict[str, Any]:
    """Return the rotate section, and the seed that orders the calibration text."""
    unused = {"own_axes"} if config.rotate.tie == "untied" else None
    return {"rotate": config.rotate.model_dump(exclude=unused), "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the rotated model, and basis.json with the energy of each channel.

    Raise ValueError before any pass for a family whose stream cannot be rotated.
    """
    ranks, section = machine.ranks, config.rotate
    origin = inputs["subject"]
    source = checkpoint(config, origin)
    anatomy = source.anatomy
    check_rotatable(anatomy)
    keeps_tie = section.tie == "keep" and anatomy.tied
    if keeps_tie and section.own_axes > anatomy.sizes.hidden:
        raise ValueError(f"rotate.own_axes: {section.own_axes} of {anatomy.sizes.hidden} hidden channels; lower it")
    need_space(out, source.bytes())
    model = load(origin, machine)
    batches = calibration(config, inputs, section.tokens, ranks)
    counts = torch.zeros(anatomy.sizes.vocabulary, dtype=torch.float64)
    watched = _counted(machine.progress(batches, len(batches), "rotate: basis"), counts)
    with placed(decoder_of(model), machine.device, config.device.layer_streaming) as decoder:
        grams = gram(decoder, anatomy, watched, (), stream=True)
    assert grams.stream is not None and grams.final is not None
    ranks.sum_([*grams.tensors(), counts])
    if ranks.rank:
        return
    if keeps_tie:
        gain = source[anatomy.final_norm].to(torch.float64) + anatomy.family.norm_offset
        kept = Shape.load(inputs["shape"]).hidden
        basis = tied_basis(grams.stream, gain, section.own_axes)
        fitted = tied_gain(basis, kept, gain, source[anatomy.embedding], counts, grams.final)
        rotated, tied = rotate_tied(anatomy, basis, fitted, source), True
    else:
        basis = principal_basis(grams.stream)
        rotated, tied = rotate(anatomy, basis, source), False
    shutil.rmtree(out, ignore_errors=True)
    tensors = machine.progress(rotated.items(), len(rotated), "rotate")
    config_json = source.config | {"tie_word_embeddings": tied}
    write_checkpoint(out, config_json, tensors, config.checkpoint.shard_bytes, origin)
    if source.wrapper_parts is not None:
        carried = rotated_tensors(source.wrapper_parts.wrapper, source.wrapper_parts.tensors, basis)
        write_wrapper_parts(out, source.wrapper_parts, carried, config.checkpoint.shard_bytes)
    energy = ((grams.stream @ basis) * basis).sum(0)
    energy *= len(energy) / energy.sum()
    StreamEnergy(tuple(energy.tolist()), tied).save(out)
    most = int((energy.cumsum(0) < 0.9 * len(energy)).sum()) + 1
    matrix = "tied to the embedding" if tied else "not tied"
    machine.say(f"rotate: {most} of {len(energy)} directions carry 90 % of the stream; output matrix {matrix}")


def _counted(batches: Iterable[Tensor], counts: Tensor) -> Iterator[Tensor]:
    """Pass batches through, adding the occurrences of each token to `counts` [vocabulary]."""
    for ids in batches:
        counts += torch.bincount(ids.flatten(), minlength=len(counts))
        yield ids


STAGE = Stage(
    name="rotate",
    makes="rotated",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    optional=("restored",),  # it makes the subject, where it is requested
    needs_also=needs_also,
    becomes=("subject",),
    enabled=enabled,
    shows={"rotated": ""},
)
