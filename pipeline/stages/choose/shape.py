"""shape: the student's five widths, as given or as a budget determines them without a measurement."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.allocate.widths import even_widths, partway, weights_within
from pipeline.config import Config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.pareto import Limits, Serving, check_alike, shape_within
from pipeline.costmodel.shapes import AXES, ModelShape, depth_for, multiples_for, neurons_for, shape_for
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Shape
from pipeline.prune.plan import kept_layers
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage

# By budget.axes: (teacher, fraction of its non-embedding parameters) -> student.
BUDGET_AXES: dict[str, Callable[[ModelShape, float], ModelShape]] = {
    "all": shape_for,
    "layers": depth_for,
    "neurons": neurons_for,
}


def check(config: Config) -> None:
    """Refuse a shape that is both given and limited by a budget, and budgets that the policies do not support.

    Where the teacher is a folder, also refuse a shape that cannot be cut from it, and a model whose speed the chip
    model cannot predict.
    """
    budget, widths = config.budget, config.plan.widths
    limited = [*budget.predicted, *(["parameters"] if budget.parameters is not None else [])]
    if config.recipe.shape == "given" and config.shape.given and limited:
        raise ValueError(f"shape: the shape is given and budget.* limits it by {limited}; set only one of them")
    if budget.axes != "all" and budget.predicted:
        raise ValueError(
            f"budget.axes: {budget.axes} supports budget.parameters only; remove {list(budget.predicted)}, or set "
            "budget.axes=all"
        )
    alike = budget.axes == "layers" or (budget.axes == "neurons" and widths != "measured")
    if alike and widths != "uniform":
        raise ValueError(
            f"budget.axes: {budget.axes} makes all layers alike, and plan.widths={widths} does not; set "
            "budget.axes=all"
        )
    if widths != "uniform" and budget.predicted:
        raise ValueError(
            f"plan.widths: {widths} gives layers different widths, and {list(budget.predicted)} of budget.* are only "
            "predicted for equal ones; set budget.parameters only"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None:
        return
    anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
    if config.recipe.shape == "search" or budget.predicted:
        check_alike(ModelShape.of(anatomy))
    elif enabled(config) and (config.stages is None or "shape" in config.stages):
        student, _ = _student(config, anatomy)
        _experts(config, anatomy)
        if "plan" in config.recipe.stages:
            kept_layers(torch.zeros(len(anatomy.sizes.layers)), student.layers, "last", config.plan.keep_first)


def enabled(config: Config) -> bool:
    """Return whether the shape is not searched, and the student not cut elsewhere."""
    return config.recipe.shape == "given" and config.model.start is None


def settings(config: Config) -> dict[str, Any]:
    """Return the shape and budget sections and what else decides which shapes are possible.

    Where limits are predicted, also the chip and how the student is served.
    """
    result = {
        "shape": config.shape.model_dump(),
        "budget": config.budget.model_dump(include={"parameters", "axes", "fallback"}),
        "own_widths": config.plan.widths != "uniform",
        "bias_compensation": config.reinit.bias_compensation,
        "progress": config.recipe.progress,
    }
    if config.budget.predicted:
        result["limits"] = config.budget.limits
        result["serving"] = config.shape_search.serving
        result["chip"] = config.device.chip_facts
    return result


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json: the student's shape after this round.

    Raise ValueError, naming the nearest possible shapes, for one that cannot be cut.
    """
    anatomy = checkpoint(config, inputs["teacher"]).anatomy
    teacher = ModelShape.of(anatomy)
    student, weights = _student(config, anatomy)
    Shape(**student.axes(), weights=weights, experts=_experts(config, anatomy)).save(out)
    kept = student.non_embedding_parameters() / teacher.non_embedding_parameters()
    machine.say(f"shape: {student.axes()} keeps {kept:.1%} of the parameters outside the embeddings")


def _student(config: Config, anatomy: Anatomy) -> tuple[ModelShape, int | None]:
    """Return this round's shape and, where layers get widths of their own within a budget, the weights they may
    hold."""
    done, rounds = config.recipe.part
    budget = config.budget.parameters or config.budget.fallback
    teacher = ModelShape.of(anatomy, config.reinit.bias_compensation)
    if config.shape.given:
        student = given_shape(teacher, config.shape.model_dump(include=set(AXES)))
    elif config.budget.predicted:
        chip = Chip(**config.device.chip_facts)
        student = shape_within(chip, teacher, Serving(**config.shape_search.serving), Limits(**config.budget.limits))
    elif config.plan.widths != "uniform":
        weights = weights_within(anatomy, 1.0 - (1.0 - budget) * done / rounds)
        even = even_widths(anatomy.sizes, weights, multiples_for(teacher).neurons)
        sizes = replace(anatomy.sizes, layers=tuple(even))
        return ModelShape.of(anatomy.narrowed(sizes, anatomy.layer_types)), weights
    else:
        student = BUDGET_AXES[config.budget.axes](teacher, budget)
    return partway(teacher, student, done, rounds), None


def _experts(config: Config, anatomy: Anatomy) -> int | None:
    """Return the experts of a layer after this round; None where all stay. Raise ValueError where they cannot."""
    wanted, routing = config.shape.experts, anatomy.routing
    if wanted is None:
        return None
    if routing is None:
        raise ValueError(
            f"shape.experts: model_type {anatomy.family.model_type!r} has no experts; leave shape.experts unset"
        )
    most = anatomy.sizes.carried["e"]
    routing.check(wanted, most)
    done, rounds = config.recipe.part
    return wanted + (most - wanted) * (rounds - done) // (rounds * routing.groups) * routing.groups


STAGE = Stage(
    name="shape",
    makes="shape",
    run=run,
    settings=settings,
    needs=("teacher", "subject"),
    enabled=enabled,
    choices={"budget.axes": BUDGET_AXES},
    check=check,
    all_ranks=False,
    shows={"shape.json": Shape.FILE},
)
