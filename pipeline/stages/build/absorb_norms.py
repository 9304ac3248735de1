"""absorb: post-norms of the cut model become static scales, trained during recovery and folded at export."""

import shutil
from pathlib import Path

from torch import nn

from pipeline.config import Config
from pipeline.model.families import FAMILIES, Family
from pipeline.model.hf_config import with_scales
from pipeline.prune.importance.measure import inverse_rms
from pipeline.prune.surgery.absorption import fitted_scales, removed_scales
from pipeline.prune.surgery.reinit import Stream, absorb_post_norms, post_norm_modules, with_static_scales
from pipeline.runtime.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.runtime.described import read_config
from pipeline.runtime.layer_streaming import placed
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.calibration import calibration
from pipeline.stages.stage import Inputs, Stage


def check(config: Config) -> None:
    """Refuse scales that were asked for by name and have no place in the teacher, where its config.json is at hand."""
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder:
        _check_family(config, FAMILIES.get(read_config(folder)["model_type"]))


def applies(config: Config, inputs: Inputs) -> bool:
    """Whether the model has post-norms beside pre-norms, none of them a scale by now, and absorption is wanted."""
    if config.reinit.absorb is False:
        return False
    start = open_checkpoint(inputs["initial_student"])
    _check_family(config, start.anatomy.family)
    return start.anatomy.family.sandwich and not start.config.get("pruned", {}).get("scales")


def settings(config: Config) -> dict:
    """Give how scales are found and, where they are measured, the tokens, their batches, and the seed that orders them.

    The paper's way is not named, so that what was made before there was another is found.
    """
    if config.reinit.absorb == "removed":
        return {"absorb": "removed"}
    named = {"absorb": "fitted"} if config.reinit.absorb == "fitted" else {}
    return named | {"tokens": config.reinit.absorb_tokens, "seed": config.seed}


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write the model folder with static scales; what is measured is measured on the cut model, added over ranks."""
    source = open_checkpoint(inputs["initial_student"])
    anatomy = source.anatomy
    find = {"auto": _absorbed, "fitted": _fitted, "removed": _removed}[config.reinit.absorb]
    frozen = find(config, inputs, source, machine)
    if machine.ranks.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
        write_checkpoint(
            out, with_scales(source.config, anatomy), frozen, config.checkpoint.shard_bytes, inputs["initial_student"]
        )
        machine.say(f"absorb: {len(post_norm_modules(anatomy))} post-norms are static scales now")


def _absorbed(config: Config, inputs: Inputs, source: Checkpoint, machine) -> Stream:
    batches = calibration(config, inputs, config.reinit.absorb_tokens, machine.ranks)
    with placed(_decoder(inputs, machine), machine.device, config.device.layer_streaming) as model:
        sums = inverse_rms(model, post_norm_modules(source.anatomy), machine.progress(batches, len(batches), "absorb"))
    machine.ranks.sum_(sums.values())
    means = {name: float(total / tokens) for name, (total, tokens) in sums.items()}
    return absorb_post_norms(source.anatomy, source, means)


def _fitted(config: Config, inputs: Inputs, source: Checkpoint, machine) -> Stream:
    anatomy, ranks = source.anatomy, machine.ranks
    batches = calibration(config, inputs, config.reinit.absorb_tokens, machine.ranks)
    passes = fitted_scales(_decoder(inputs, machine), anatomy, batches, machine.device.torch, ranks.sum_)
    scales = dict(machine.progress(passes, len(post_norm_modules(anatomy)), "absorb"))
    return with_static_scales(anatomy, source, scales)


def _removed(config: Config, inputs: Inputs, source: Checkpoint, machine) -> Stream:
    return with_static_scales(source.anatomy, source, removed_scales(source.anatomy))


def _decoder(inputs: Inputs, machine) -> nn.Module:
    return load_model(inputs["initial_student"], machine.device.compute_dtype, machine.device.attention).get_decoder()


def _check_family(config: Config, family: Family | None) -> None:
    """Raise ValueError for a family without post-norms beside pre-norms; one without a table is told elsewhere."""
    if config.reinit.absorb in ("fitted", "removed") and family is not None and not family.sandwich:
        raise ValueError(
            f"reinit.absorb={config.reinit.absorb} puts scales in the place of post-norms, and model_type "
            f"{family.model_type!r} has none beside its pre-norms; set reinit.absorb=auto or false"
        )


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
