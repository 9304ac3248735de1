"""Estimates for a chip: what the trainings of a run need on it, and a chip model fitted to this machine's device."""

import datetime
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config import Config
from pipeline.costmodel.calibrate import calibrate, write_chip
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.expert_budget import check_covered
from pipeline.costmodel.pareto import Limits, Serving, shape_within
from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.training_cost import Recovery, training_needs
from pipeline.distill import next_token
from pipeline.distill.loss import WorkSpace, work_space
from pipeline.graph import STAGES
from pipeline.model.logits import logit_form
from pipeline.model.shape import Shape
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import choose, kind_of_chip, open_device
from pipeline.runtime.log import progress
from pipeline.stages.recover import onpolicy
from pipeline.training_settings import steps_of

COUNTED = {"teacher_correction", "importance", "regularize", "distill", "onpolicy"}  # stages in the times of `needs`


def needs(config: Config, made: Mapping[str, Path], ranks: int) -> str:
    """Return the answer of a dry run: devices, memory and hours of the trainings of a recipe, on the configured chip.

    `made` holds the teacher, and the shape, or the initial student where it was cut elsewhere, or neither where the
    shape is searched. With one rank the answer is for the fewest devices that hold a training, else for as many as
    there are ranks.
    """
    checkpoint = open_checkpoint(made["teacher"], config.model.allow_pickle)
    teacher = ModelShape.of(checkpoint.anatomy, config.reinit.bias_compensation)
    check_covered(teacher, "dry_run", "set dry_run=false")
    teacher = replace(teacher, vocabulary=min(teacher.vocabulary, config.budget.vocabulary or teacher.vocabulary))
    devices, regularizes = ranks if ranks > 1 else None, config.regularize.norm != "none"
    student, sentences = _student(config, made, teacher)
    for section, trains in (("teacher_correction", config.corrects), ("regularize", regularizes)):
        if trains:
            run = _of_text(config, section, _next_token_space())
            sentences.append(training_needs(_chip(config), None, teacher, run, devices).sentence())
    if "distill" in config.recipe.stages:
        loss = config.distill.loss
        space = _distillation_space(config, checkpoint.config, loss.kind, loss.cross_entropy)
        run = _of_text(config, "distill", space)
        sentences.append(training_needs(_chip(config), teacher, student, run, devices).sentence())
    else:
        when = "after the cut" if regularizes or config.corrects else "on its way"
        sentences.append(
            f"recipe {config.recipe.name} has no distill: no weights are trained {when} to {student.axes()}"
        )
    if onpolicy.enabled(config):
        run = _on_policy(config, _distillation_space(config, checkpoint.config, config.onpolicy.divergence, 0.0))
        sentences.append(training_needs(_chip(config), teacher, student, run, devices).sentence())
    return "; ".join(sentences)


def omitted(config: Config, made: Mapping[str, Path], stages: Iterable[str]) -> str:
    """Return a clause that names those of the stages of a run that read text and are in no time of `needs`.

    Whether a stage applies to the student is decided by the teacher, which has the same norms.
    """
    inputs = {"initial_student": made["teacher"], **made}
    own = [STAGES[name] for name in stages if name not in COUNTED and "tokens" in STAGES[name].needs]
    named = [stage.name for stage in own if stage.enabled(config) and stage.applies(config, inputs)]
    return f"; not in these times: {', '.join(named)}" if named else ""


def _student(config: Config, made: Mapping[str, Path], teacher: ModelShape) -> tuple[ModelShape, list[str]]:
    """Return the student's shape, and the sentences that come before the needs."""
    if "initial_student" in made:
        return ModelShape.of(open_checkpoint(made["initial_student"], config.model.allow_pickle).anatomy), []
    if "shape" in made:
        chosen = Shape.load(made["shape"])
        mixture = teacher.mixture.changed(chosen) if teacher.mixture else None
        return replace(teacher.changed(chosen.axes()), mixture=mixture), []
    shape = shape_within(_chip(config), teacher, Serving(**config.shape_search.serving), Limits(**config.budget.limits))
    return shape, [f"the search will measure which shape; of those within its limits {shape.axes()} promises the most"]


def _of_text(config: Config, section: str, space: WorkSpace) -> Recovery:
    """Return the cost of a training on packed text."""
    sequence = config.data.sequence_length
    return _training(config, section, space, steps_of(section, getattr(config, section), sequence), sequence)


def _training(config: Config, section: str, space: WorkSpace, steps: int, sequence: int) -> Recovery:
    training = getattr(config, section)
    return Recovery(
        steps=steps,
        sequence=sequence,
        batch=training.global_batch_size,
        micro_batch=training.micro_batch_size,
        precision="fp32" if training.precision == "fp32" else "bf16",
        zero_stage=config.deepspeed.stage,
        checkpointing=training.gradient_checkpointing,
        chunk=config.logits.chunk,
        loss_buffers=space.buffers,
        loss_block=space.logits,
        score_tokens=config.score.tokens if section == "distill" and "importance" in config.recipe.stages else 0,
        section=section,
    )


def _on_policy(config: Config, space: WorkSpace) -> Recovery:
    """Return the cost of on-policy distillation with answers of mean length."""
    options = config.onpolicy
    written = (options.min_new_tokens + options.max_new_tokens) // 2
    sequence = options.prompt_tokens + written
    return replace(_training(config, "onpolicy", space, onpolicy.steps_of(config), sequence), written=written)


def _distillation_space(config: Config, teacher: Mapping[str, Any], divergence: str, entropy: float) -> WorkSpace:
    """Return what the loss of a distillation works in on the configured chip; the student keeps the teacher's logits.

    `entropy`: the weight of the cross entropy.
    """
    form = logit_form(SimpleNamespace(**teacher))
    kind = kind_of_chip(_chip(config).name) or choose(config.device.kind)
    return work_space(divergence, config.distill.loss.kernel, kind, entropy, form, form)


def _next_token_space() -> WorkSpace:
    """Return what the next-token loss works in: it computes a whole chunk at once."""
    return WorkSpace(next_token.HELD, sys.maxsize)


def _chip(config: Config) -> Chip:
    return Chip(**config.device.chip_facts)


def calibrate_chip(config: Config) -> Path:
    """Time matrix products on this device, fit the chip model to them, write the chip file and return its path."""
    device = open_device(config.device.kind, config.device.attention, False, 0, config.seed)
    options = config.calibrate
    path = Path(options.folder) / f"{options.name}.yaml"
    if not path.parent.is_dir():
        raise ValueError(f"calibrate.folder: {options.folder} does not exist; create it, or set another")
    made = calibrate(
        Chip(**config.device.chip_facts),
        options.name,
        device.torch,
        device.synchronise,
        options.rounds,
        progress=lambda rounds: progress(rounds, options.rounds, "calibrate", 0),
    )
    write_chip(made, path, f"{device.name}, {datetime.date.today()}")
    errors = made.summary()
    if not all(math.isfinite(error) for error in errors.values()):
        raise FloatingPointError(f"the fit to this device's timings did not converge ({errors}); see {path}")
    print(
        f"{device.name}: {len(made.held_out)} products never fitted are predicted within "
        f"{errors['held_out_median']:.1%} in the median, {errors['held_out_largest']:.0%} at most; written to {path}"
    )
    return path
