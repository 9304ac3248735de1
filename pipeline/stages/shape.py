"""shape: the student's five widths, as given or as a budget chooses them with nothing measured."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.search.chip import Chip
from pipeline.search.pareto import Limits, Serving, shape_within
from pipeline.search.shapes import ModelShape, depth_for, given_shape, shape_for

MAKES = "shape"
NEEDS = ("teacher",)
EVERY_RANK = False


def check(config: Config) -> None:
    """Refuse a shape that is given and asked to keep to what a chip is predicted to do, too."""
    if config.recipe.shape == "given" and config.shape.given and config.budget.predicted:
        raise ValueError(f"shape.* gives the shape and budget.* limits it by {list(config.budget.predicted)}; give one")
    if config.budget.axes == "layers" and config.budget.predicted:
        raise ValueError(
            f"budget.axes=layers goes by budget.parameters alone; leave {list(config.budget.predicted)} out"
        )


def needed(config: Config) -> bool:
    """Whether the shape is not searched."""
    return config.recipe.shape == "given"


def settings(config: Config) -> dict:
    """Give the shape and budget sections; where limits are predicted, also the chip and how it is used."""
    budget = config.budget.model_dump(include={"parameters", "axes", "fallback"})
    asked = {"shape": config.shape.model_dump(), "budget": budget, "way": config.recipe.shape}
    if config.budget.predicted:
        serving, chip = config.search.serving, config.device.chip_facts
        asked |= {"limits": config.budget.limits, "serving": serving, "chip": chip}
    return asked


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write shape.json; ValueError, naming the nearest possible shapes, for one the teacher cannot give."""
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    teacher = ModelShape.of(anatomy.sizes, anatomy.tied)
    if config.shape.given:
        student = given_shape(teacher, config.shape.model_dump())
    elif config.budget.predicted:
        chip = Chip(**config.device.chip_facts)
        student = shape_within(chip, teacher, Serving(**config.search.serving), Limits(**config.budget.limits))
    else:
        narrow = depth_for if config.budget.axes == "layers" else shape_for
        student = narrow(teacher, config.budget.parameters or config.budget.fallback)
    (out / "shape.json").write_text(json.dumps(student.axes(), indent=2))
    kept = student.non_embedding_parameters() / teacher.non_embedding_parameters()
    machine.say(f"shape: {student.axes()} keeps {kept:.1%} of the parameters outside the embeddings")
