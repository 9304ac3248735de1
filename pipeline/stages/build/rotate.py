"""basis: the teacher with its residual stream turned, as a model folder, so that cutting may take its first channels.

Heads, neurons, layers and what they read stay what they are under a turned stream: their scores, Gram matrices and
losses are measured on the teacher itself.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.model.families import EMBEDDING, FINAL_NORM
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.surgery.rotate import (
    check_rotatable,
    principal_basis,
    rotate,
    rotate_tied,
    tied_basis,
    tied_gain,
)
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.disk import need_space
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage


def enabled(config: Config) -> bool:
    """Whether channels are taken from other axes than the teacher's own."""
    return config.rotate.kind != "none"


def needs_also(config: Config) -> tuple[str, ...]:
    """Give the shape, where a gain is fitted for the channels that will stay."""
    return ("shape",) if config.rotate.tie == "keep" else ()


def settings(config: Config) -> dict:
    """Give the basis section, the batches, and the seed that orders the calibration text."""
    unused = {"own_axes"} if config.rotate.tie == "untied" else set()
    return config.rotate.model_dump(exclude=unused) | {"seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the turned model, and basis.json: `energy`, the mean square of each channel at the norms, all together h.

    ValueError before any pass for a family whose stream cannot be turned.
    """
    device, ranks, asked = machine.device, machine.ranks, config.rotate
    origin = inputs["subject"]
    source = open_checkpoint(origin, config.model.allow_pickle)
    anatomy = source.anatomy
    check_rotatable(anatomy)
    keeps = asked.tie == "keep" and anatomy.tied
    if keeps and asked.own_axes > anatomy.sizes.hidden:
        raise ValueError(f"rotate.own_axes is {asked.own_axes}; the model has {anatomy.sizes.hidden} hidden channels")
    need_space(out, source.bytes())
    model = load_model(origin, device.compute_dtype, device.attention, config.model.trust_remote_code)
    batches = calibration(config, inputs, asked.tokens, ranks)
    counts = torch.zeros(anatomy.sizes.vocabulary, dtype=torch.float64)
    watched = _counted(machine.progress(batches, len(batches), "basis"), counts)
    with placed(model.get_decoder(), device, config.device.layer_streaming) as decoder:
        grams = gram(decoder, anatomy, watched, (), stream=True)
    ranks.sum_([*grams.tensors(), counts])
    if ranks.rank:
        return
    if keeps:
        gain = source[FINAL_NORM].to(torch.float64) + anatomy.family.norm_offset
        kept = json.loads((inputs["shape"] / "shape.json").read_text())["hidden"]
        basis = tied_basis(grams.stream, gain, asked.own_axes)
        fitted = tied_gain(basis, kept, gain, source[EMBEDDING], counts, grams.final)
        turned, tied = rotate_tied(anatomy, basis, fitted, source), True
    else:
        basis = principal_basis(grams.stream)
        turned, tied = rotate(anatomy, basis, source), False
    shutil.rmtree(out, ignore_errors=True)
    kind = source.config | {"tie_word_embeddings": tied}
    tensors = machine.progress(turned.items(), len(turned), "turn")
    write_checkpoint(out, kind, tensors, config.checkpoint.shard_bytes, inputs["subject"])
    energy = ((grams.stream @ basis) * basis).sum(0)
    energy *= len(energy) / energy.sum()
    (out / "basis.json").write_text(json.dumps({"energy": energy.tolist(), "tied": tied}))
    half = int((energy.cumsum(0) < 0.9 * len(energy)).sum()) + 1
    machine.say(f"basis: {half} of {len(energy)} directions carry 90 % of the stream, output matrix {_told(tied)}")


def _counted(batches: Iterable[Tensor], counts: Tensor) -> Iterator[Tensor]:
    for ids in batches:
        counts += torch.bincount(ids.flatten(), minlength=len(counts))
        yield ids


def _told(tied: bool) -> str:
    return "tied to the embedding" if tied else "of its own"


STAGE = Stage(
    name="rotate",
    makes="rotated",
    run=run,
    settings=settings,
    needs=("subject", "tokens"),
    needs_also=needs_also,
    becomes=("subject",),
    enabled=enabled,
    shows={"rotated": ""},
)
