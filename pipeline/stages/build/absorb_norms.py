"""absorb_norms: post-norms of the cut model become static scales, trained in recovery and folded at export."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config import Config
from pipeline.model.causal import decoder_of
from pipeline.model.families import FAMILIES, Family
from pipeline.model.hf_config import with_scales
from pipeline.prune.importance.measure import inverse_rms
from pipeline.prune.surgery.absorption import fitted_scales, removed_scales
from pipeline.prune.surgery.reinit import Stream, absorb_post_norms, post_norm_modules, with_static_scales
from pipeline.runtime.checkpoint import Checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.described import read_config
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.calibration import calibration
from pipeline.stages.models import checkpoint, load
from pipeline.stages.stage import Inputs, Stage


def check(config: Config) -> None:
    """Refuse scales set by name that the teacher's family has no place for, where its config.json is available."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder:
        _check_family(config, FAMILIES.get(str(read_config(folder).get("model_type"))))


def applies(config: Config, inputs: Inputs) -> bool:
    """Return whether the model has post-norms beside pre-norms that are not static scales yet."""
    if config.reinit.absorb is False:
        return False
    start = checkpoint(config, inputs["initial_student"])
    _check_family(config, start.anatomy.family)
    return start.anatomy.family.sandwich and not start.config.get("pruned", {}).get("scales")


def settings(config: Config) -> dict[str, Any]:
    """Return how scales are determined and, where they are measured, the tokens and the seed that orders the text."""
    if config.reinit.absorb == "removed":
        return {"absorb": "removed"}
    return {"absorb": config.reinit.absorb, "tokens": config.reinit.absorb_tokens, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the model folder with static scales; measurements are made on the cut model and summed over ranks."""
    source = checkpoint(config, inputs["initial_student"])
    anatomy = source.anatomy
    stream = METHODS[str(config.reinit.absorb)](config, inputs, source, machine)
    if machine.ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        config_json = with_scales(source.config, anatomy)
        write_checkpoint(out, config_json, stream, config.checkpoint.shard_bytes, inputs["initial_student"])
        machine.say(f"absorb_norms: {len(post_norm_modules(anatomy))} post-norms replaced by static scales")


def _absorbed(config: Config, inputs: Inputs, source: Checkpoint, machine: Machine) -> Stream:
    """Return the tensors with scales from the mean inverse root mean square of what each post-norm reads."""
    batches = calibration(config, inputs, config.reinit.absorb_tokens, machine.ranks)
    with placed(_decoder(config, inputs, machine), machine.device, config.device.layer_streaming) as model:
        sums = inverse_rms(
            model, post_norm_modules(source.anatomy), machine.progress(batches, len(batches), "absorb_norms")
        )
    machine.ranks.sum_(sums.values())
    means = {name: float(total / tokens) for name, (total, tokens) in sums.items()}
    return absorb_post_norms(source.anatomy, source, means)


def _fitted(config: Config, inputs: Inputs, source: Checkpoint, machine: Machine) -> Stream:
    """Return the tensors with scales fitted by least squares to what each post-norm writes, one after another."""
    anatomy, ranks = source.anatomy, machine.ranks
    batches = calibration(config, inputs, config.reinit.absorb_tokens, machine.ranks)
    passes = fitted_scales(_decoder(config, inputs, machine), anatomy, batches, machine.device.torch, ranks.sum_)
    scales = dict(machine.progress(passes, len(post_norm_modules(anatomy)), "absorb_norms"))
    return with_static_scales(anatomy, source, scales)


def _removed(config: Config, inputs: Inputs, source: Checkpoint, machine: Machine) -> Stream:
    """Return the tensors without norm and gain: scales of one."""
    return with_static_scales(source.anatomy, source, removed_scales(source.anatomy))


def _decoder(config: Config, inputs: Inputs, machine: Machine) -> nn.Module:
    return decoder_of(load(inputs["initial_student"], machine))


def _check_family(config: Config, family: Family | None) -> None:
    """Raise ValueError for a family without post-norms beside pre-norms. Other stages refuse an unknown family."""
    if config.reinit.absorb in ("fitted", "removed") and family is not None and not family.sandwich:
        raise ValueError(
            f"reinit.absorb: {config.reinit.absorb} replaces post-norms by scales, and model_type "
            f"{family.model_type!r} has no post-norms beside its pre-norms; set reinit.absorb=auto or false"
        )


METHODS: dict[str, Callable[[Config, Inputs, Checkpoint, Machine], Stream]] = {
    "auto": _absorbed,
    "fitted": _fitted,
    "removed": _removed,
}

STAGE = Stage(
    name="absorb_norms",
    makes="initial_student",
    run=run,
    settings=settings,
    needs=("initial_student", "tokens"),
    applies=applies,
    check=check,
    shows={"initial_student": ""},
)
