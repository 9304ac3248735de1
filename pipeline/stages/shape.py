"""shape: the student's five widths, as given or as a parameter budget chooses them."""

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.search.shapes import ModelShape, given_shape, shape_for

MAKES = "shape"
NEEDS = ("teacher",)
EVERY_RANK = False


def settings(config: Config) -> dict:
    """Give the shape and budget sections."""
    return {"shape": config.shape.model_dump(), "budget": config.budget.model_dump(), "way": config.recipe.shape}


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write shape.json; ValueError, naming the nearest possible shapes, for one the teacher cannot give."""
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    teacher = ModelShape.of(anatomy.sizes, anatomy.tied)
    if config.shape.given:
        student = given_shape(teacher, config.shape.model_dump())
    else:
        student = shape_for(teacher, config.budget.parameters or config.budget.fallback)
    (out / "shape.json").write_text(json.dumps(student.axes(), indent=2))
    kept = student.non_embedding_parameters() / teacher.non_embedding_parameters()
    machine.say(f"shape: {student.axes()} keeps {kept:.1%} of the parameters outside the embeddings")

