"""Answers about a chip, before or beside a run: what recovery will need on it, and how fast the one at hand is."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.costmodel.calibrate import calibrate, write_chip
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.pareto import Limits, Serving, shape_within
from pipeline.costmodel.shapes import ModelShape
from pipeline.costmodel.training_cost import Recovery, training_needs
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.log import progress
from pipeline.training import steps_of


def needs(config: Config, made: Mapping[str, Path], ranks: int) -> str:
    """Give the answer of a dry run: devices, memory and hours of what the line trains, on the configured chip.

    `made` holds the teacher and the shape, or the start where the student was cut elsewhere, or neither where the shape
    is searched. With one rank the fewest devices that hold a training are found; with more, theirs.
    """
    anatomy = open_checkpoint(made["teacher"], config.model.allow_pickle).anatomy
    teacher = ModelShape.of(anatomy, config.reinit.bias_compensation)
    devices, settles = ranks if ranks > 1 else None, config.regularize.norm != "none"
    student, told = _student(config, made, teacher)
    for section, trains in (("correct", config.corrects), ("settle", settles)):
        if trains:
            run = _training(config, section, getattr(config, section).chunk)
            told.append(training_needs(_chip(config), None, teacher, run, devices).sentence())
    if "distill" in config.recipe.stages:
        run = _training(config, "distill", config.logits.chunk)
        told.append(training_needs(_chip(config), teacher, student, run, devices).sentence())
    else:
        when = "after the cut" if settles or config.corrects else "on its way"
        told.append(f"recipe {config.recipe.name} has no distill: no weights are trained {when} to {student.axes()}")
    return "; ".join(told)


def _student(config: Config, made: Mapping[str, Path], teacher: ModelShape) -> tuple[ModelShape, list[str]]:
    """Give the student's shape, and what is to be said of it first."""
    if "start" in made:
        given = open_checkpoint(made["start"], config.model.allow_pickle).anatomy
        return ModelShape.of(given), []
    if "shape" in made:
        return teacher.changed(json.loads((made["shape"] / "shape.json").read_text())), []
    found = shape_within(_chip(config), teacher, Serving(**config.shape_search.serving), Limits(**config.budget.limits))
    return found, [f"the search will measure which shape; of those within its limits {found.axes()} promises the most"]


def _training(config: Config, section: str, chunk: int) -> Recovery:
    asked = getattr(config, section)
    return Recovery(
        steps=steps_of(section, asked, config.data.sequence_length),
        sequence=config.data.sequence_length,
        batch=asked.global_batch_size,
        micro_batch=asked.micro_batch_size,
        precision="fp32" if asked.precision == "fp32" else "bf16",
        zero_stage=config.deepspeed.stage,
        checkpointing=asked.gradient_checkpointing,
        chunk=chunk,
        score_tokens=config.score.tokens if section == "distill" and "score" in config.recipe.stages else 0,
        section=section,
    )


def _chip(config: Config) -> Chip:
    return Chip(**config.device.chip_facts)


def calibrate_chip(config: Config) -> Path:
    """Time matrix products on this device, fit the chip model to them, and write the chip as a file; give its path."""
    device = open_device(config.device.kind, config.device.attention, False, 0, config.seed)
    asked = config.calibrate
    path = Path(asked.folder) / f"{asked.name}.yaml"
    if not path.parent.is_dir():
        raise ValueError(f"calibrate.folder is {asked.folder}, which does not exist; make it or give another")
    made = calibrate(
        Chip(**config.device.chip_facts),
        asked.name,
        device.torch,
        device.synchronise,
        asked.rounds,
        progress=lambda rounds: progress(rounds, asked.rounds, "calibrate", 0),
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
