"""Answers about a chip, before or beside a run: what recovery will need on it, and how fast the one at hand is."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.device import open_device
from pipeline.runtime.log import progress
from pipeline.search.calibrate import calibrate, write_chip
from pipeline.search.chip import Chip
from pipeline.search.pareto import Limits, Serving, shape_within
from pipeline.search.shapes import ModelShape
from pipeline.search.training import Recovery, training_needs


def needs(config: Config, made: Mapping[str, Path], ranks: int) -> str:
    """Give the answer of a dry run: devices, memory and hours of recovery on the configured chip.

    `made` holds the teacher and, unless it is searched, the shape. With one rank the fewest devices that hold it are
    found; with more, theirs.
    """
    anatomy = open_checkpoint(made["teacher"], config.model.allow_pickle).anatomy
    teacher = ModelShape.of(anatomy.sizes, anatomy.tied)
    chip = Chip(**config.device.chip_facts)
    if "shape" in made:
        student, told = teacher.changed(json.loads((made["shape"] / "shape.json").read_text())), ""
    else:
        student = shape_within(chip, teacher, Serving(**config.search.serving), Limits(**config.budget.limits))
        told = f"the search will measure which shape; of those within its limits {student.axes()} promises the most: "
    asked = config.distill
    run = Recovery(
        tokens=asked.tokens,
        sequence=config.data.sequence,
        batch=asked.batch,
        micro_batch=asked.micro_batch,
        precision="fp32" if asked.precision == "fp32" else "bf16",
        zero_stage=config.deepspeed.stage,
        checkpointing=asked.gradient_checkpointing,
        chunk=asked.loss.chunk,
        score_tokens=config.score.tokens,
    )
    return told + training_needs(chip, teacher, student, run, ranks if ranks > 1 else None).sentence()


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
