"""shape: the student's five widths, as given or as a budget chooses them with nothing measured."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.allocate.widths import even_widths, partway, weights_within
from pipeline.config import Config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.pareto import Limits, Serving, check_alike, shape_within
from pipeline.costmodel.shapes import ModelShape, depth_for, multiples_for, neurons_for, shape_for
from pipeline.model.anatomy import Anatomy
from pipeline.prune.plan import kept_layers
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.stage import Inputs, Stage

CHOICES = {"all": shape_for, "layers": depth_for, "neurons": neurons_for}  # by budget.axes


def check(config: Config) -> None:
    """Refuse a shape that is given and limited by a budget, too.

    Where the teacher is a folder, refuse a shape that cannot be cut from it, and what no chip can be predicted to do.
    """
    limited = list(config.budget.predicted) + ["parameters"] * (config.budget.parameters is not None)
    if config.recipe.shape == "given" and config.shape.given and limited:
        raise ValueError(f"shape.* gives the shape and budget.* limits it by {limited}; give one")
    axes, widths = config.budget.axes, config.plan.widths
    if axes != "all" and config.budget.predicted:
        limits = list(config.budget.predicted)
        raise ValueError(
            f"budget.axes={axes} goes by budget.parameters alone; leave {limits} out, or set budget.axes=all"
        )
    alike = axes == "layers" or (axes == "neurons" and widths != "measured")
    if alike and widths != "uniform":
        raise ValueError(f"budget.axes={axes} makes all layers alike, and plan.widths={widths} does not; set axes=all")
    if config.plan.widths != "uniform" and config.budget.predicted:
        raise ValueError(
            f"plan.widths={config.plan.widths} gives each layer its own widths and budget.* limits the shape by "
            f"{list(config.budget.predicted)}, predicted of equal ones; set budget.parameters alone"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None:
        return
    anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
    if config.recipe.shape == "search" or config.budget.predicted:
        check_alike(ModelShape.of(anatomy))
    elif enabled(config) and (config.stages is None or "shape" in config.stages):
        student, _ = _student(config, anatomy)
        if "plan" in config.recipe.stages:
            kept_layers(torch.zeros(len(anatomy.sizes.layers)), student.layers, "last", config.plan.keep_first)


def enabled(config: Config) -> bool:
    """Whether the shape is not searched, and the student not cut elsewhere."""
    return config.recipe.shape == "given" and config.model.start is None


def settings(config: Config) -> dict:
    """Give the shape and budget sections and what else decides which shapes are possible; where limits are predicted,
    also the chip and how it is used."""
    budget = config.budget.model_dump(include={"parameters", "axes", "fallback"})
    asked = {"shape": config.shape.model_dump(), "budget": budget, "way": config.recipe.shape}
    if config.budget.predicted:
        serving, chip = config.shape_search.serving, config.device.chip_facts
        asked |= {"limits": config.budget.limits, "serving": serving, "chip": chip}
    biased = {"bias_compensation": True} if config.reinit.bias_compensation else {}
    return asked | ({"layers": "own"} if config.plan.widths != "uniform" else {}) | biased | config.recipe.progress


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json: this round's share of the way to the student's shape.

    Where layers will have widths of their own within a budget, it says the `weights` they may hold together, and the
    shape of equal layers that hold them. ValueError, naming the nearest possible shapes, for one that cannot be cut.
    """
    anatomy = open_checkpoint(inputs["teacher"], config.model.allow_pickle).anatomy
    teacher = ModelShape.of(anatomy)
    student, own = _student(config, anatomy)
    (out / "shape.json").write_text(json.dumps(student.axes() | own, indent=2))
    kept = student.non_embedding_parameters() / teacher.non_embedding_parameters()
    machine.say(f"shape: {student.axes()} keeps {kept:.1%} of the parameters outside the embeddings")


def _student(config: Config, anatomy: Anatomy) -> tuple[ModelShape, dict[str, int]]:
    """Give this round's shape and, where layers will have widths of their own within a budget, their `weights`."""
    done, rounds = config.recipe.part
    budget = config.budget.parameters or config.budget.fallback
    own = {}
    teacher = ModelShape.of(anatomy, config.reinit.bias_compensation)
    if config.shape.given:
        student = given_shape(teacher, config.shape.model_dump())
    elif config.budget.predicted:
        chip = Chip(**config.device.chip_facts)
        student = shape_within(chip, teacher, Serving(**config.shape_search.serving), Limits(**config.budget.limits))
    elif config.plan.widths != "uniform":
        own = {"weights": weights_within(anatomy, 1.0 - (1.0 - budget) * done / rounds)}
        even = even_widths(anatomy.sizes, own["weights"], multiples_for(teacher).neurons)
        student = ModelShape.of(anatomy.narrowed(replace(anatomy.sizes, layers=tuple(even)), anatomy.layer_types))
    else:
        student = CHOICES[config.budget.axes](teacher, budget)
    if not own:
        student = partway(teacher, student, done, rounds)
    return student, own


STAGE = Stage(
    name="shape",
    makes="shape",
    run=run,
    settings=settings,
    needs=("teacher", "subject"),
    enabled=enabled,
    check=check,
    all_ranks=False,
    shows={"shape.json": "shape.json"},
)
