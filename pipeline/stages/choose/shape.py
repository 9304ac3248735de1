"""shape: the student's five widths, as given or as a budget determines them without a measurement."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.allocate.budgets import layer_weights
from pipeline.allocate.widths import even_widths, partway, weights_of_size, weights_within
from pipeline.config import Config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.expert_budget import check_counted, experts_for, with_experts
from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.pareto import Limits, Serving, check_alike, shape_within, speedup_of
from pipeline.costmodel.shapes import AXES, ModelShape, depth_for, multiples_for, neurons_for, shape_for
from pipeline.costmodel.size_budget import Unit, parameters_of, shape_of_size
from pipeline.model.anatomy import Anatomy, LayerSizes
from pipeline.model.blueprint import check_expert_neurons
from pipeline.model.shape import Budgeted, Shape
from pipeline.prune.plan import kept_layers
from pipeline.prune.surgery.bias import biased_anatomy
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_source import model_folder
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs, Stage

EXACT = 1e-9  # what rounding may add to a step


def unchanged(teacher: ModelShape, fraction: float) -> ModelShape:
    """Return the teacher's shape, whose experts alone a budget narrows."""
    return teacher


# By budget.axes: (teacher, fraction of its non-embedding parameters) -> student.
BUDGET_AXES: dict[str, Callable[[ModelShape, float], ModelShape]] = {
    "all": shape_for,
    "layers": depth_for,
    "neurons": neurons_for,
    "experts": unchanged,  # `experts_for` counts them
}


def check(config: Config) -> None:
    """Refuse a shape that is both given and limited by a budget, and budgets that the policies do not support.

    Where the teacher is a folder, also refuse a shape that cannot be cut from it, and a model whose speed the chip
    model cannot predict.
    """
    budget, widths = config.budget, config.plan.widths
    limited = [*budget.predicted, *budget.sized]
    if config.recipe.shape == "given" and config.shape.given and limited:
        raise ValueError(f"shape: the shape is given and budget.* limits it by {limited}; set only one of them")
    requested = [*budget.sized, *(["speedup"] if budget.speedup else [])]
    if config.recipe.shape == "given" and len(requested) > 1:
        raise ValueError(f"budget: {' and '.join(requested)} are given, and each determines the shape; keep one")
    if budget.context and not budget.bytes:
        raise ValueError("budget.context: counts a KV cache into budget.bytes, which is null; set budget.bytes too")
    if budget.context and widths != "uniform":
        raise ValueError(
            f"budget.context: plan.widths={widths} gives layers different KV groups, so the cache is not known; set "
            "plan.widths=uniform, or leave budget.context out"
        )
    if budget.axes != "all" and budget.predicted:
        raise ValueError(
            f"budget.axes: {budget.axes} supports budget.parameters, total and bytes only; remove "
            f"{list(budget.predicted)}, or set budget.axes=all"
        )
    if budget.active_parameters and (budget.axes == "experts" or widths != "uniform"):
        chosen = "budget.axes=experts" if budget.axes == "experts" else f"plan.widths={widths}"
        raise ValueError(
            f"budget.active_parameters: {chosen} does not determine what a token uses; set plan.widths=uniform and "
            "budget.axes=all, layers or neurons"
        )
    alike = budget.axes in ("layers", "experts") or (budget.axes == "neurons" and widths != "measured")
    if alike and widths != "uniform":
        raise ValueError(
            f"budget.axes: {budget.axes} makes all layers alike, and plan.widths={widths} does not; set budget.axes=all"
        )
    if widths != "uniform" and budget.predicted:
        raise ValueError(
            f"plan.widths: {widths} gives layers different widths, and {list(budget.predicted)} of budget.* are only "
            "predicted for equal ones; set budget.parameters, total or bytes"
        )
    folder = model_folder(config.model.path, config.model.allow_pickle)
    if folder is None:
        return
    anatomy = open_checkpoint(folder, config.model.allow_pickle).anatomy
    if config.recipe.shape == "search" or budget.predicted:
        check_alike(ModelShape.of(anatomy))
    elif enabled(config) and (config.stages is None or "shape" in config.stages):
        student = _student(config, anatomy).shape
        if "plan" in config.recipe.stages:
            kept_layers(torch.zeros(len(anatomy.sizes.layers)), student.layers, "last", config.plan.keep_first)
            if widths == "adaptive":
                _check_amplitude(config, anatomy)


def _check_amplitude(config: Config, anatomy: Anatomy) -> None:
    """Refuse an amplitude that is larger than the step of a round; the teacher's layers count as alike.

    Steps after a round that removes layers are not known: which layers those are decides how sparse the others are.
    """
    sizes, plan, before, layers = anatomy.sizes, config.plan, 0.0, None
    for number in range(1, config.recipe.rounds + 1):
        student = _student(config.at_round(number), anatomy)
        shape = student.shape
        if layers not in (None, shape.layers):
            return
        left = replace(sizes, hidden=shape.hidden, layers=sizes.layers[: shape.layers])
        even = [LayerSizes(shape.heads, shape.groups, shape.neurons)] * shape.layers
        weights = layer_weights(left, even) if student.weights is None else student.weights
        sparsity = 1.0 - weights / layer_weights(left, left.layers)
        step = (sparsity - before) / plan.steps
        if plan.amplitude > step + EXACT:
            raise ValueError(
                f"plan.amplitude: {plan.amplitude} is more than the step {step:.4g} of round {number} of"
                f" {config.recipe.rounds}, so a layer would grow; lower it"
            )
        before, layers = sparsity, shape.layers


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
    counted = {name: value for name, value in config.budget.sized.items() if name != "parameters"}
    if counted:
        result["size"] = counted | {
            "context": config.budget.context,
            "dtype": config.export.dtype if config.budget.bytes else None,
            "untied": _unties(config),
        }
    if config.budget.of_tokens_alone:
        result["tokens_alone"] = True
    if config.budget.predicted:
        result["limits"] = config.budget.limits
        result["serving"] = config.shape_search.serving
        result["chip"] = config.device.chip_facts
    return result


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write shape.json: the student's shape after this round; and budget.json where a budget determined it.

    Raise ValueError, naming the nearest possible shapes, for one that cannot be cut, and naming the reachable range,
    for a budget that no shape keeps to.
    """
    anatomy = checkpoint(config, inputs["teacher"]).anatomy
    teacher = ModelShape.of(anatomy)
    student = _student(config, anatomy)
    made = Shape(**student.shape.axes(), weights=student.weights)
    replace(made, experts=student.experts, expert_neurons=student.expert_neurons).save(out)
    if teacher.experts:
        kept, used = _kept(anatomy, student)
        words = f"{student.shape.axes()}, {student.experts or teacher.experts} of {teacher.experts} experts per layer"
        machine.say(
            f"shape: {words}, keeps {kept:.1%} of the parameters outside the embeddings, and {used:.1%} of those that "
            "a token uses"
        )
    else:
        kept = student.shape.non_embedding_parameters() / teacher.non_embedding_parameters()
        machine.say(f"shape: {student.shape.axes()} keeps {kept:.1%} of the parameters outside the embeddings")
    if student.budget is not None:
        student.budget.save(out)
        machine.say(student.budget.sentence())


@dataclass(frozen=True)
class Student:
    """This round's shape; where layers get widths of their own within a budget, the weights they may hold; in the last
    round, what a budget for equal layers reached; and the experts of a layer and the neurons of each, None where all
    stay."""

    shape: ModelShape
    weights: int | None = None
    budget: Budgeted | None = None
    experts: int | None = None
    expert_neurons: int | None = None


def _student(config: Config, anatomy: Anatomy) -> Student:
    """Return the student of this round."""
    done, rounds = config.recipe.part
    teacher = ModelShape.of(anatomy, config.reinit.bias_compensation)
    if config.shape.given:
        shape = given_shape(teacher, config.shape.model_dump(include=set(AXES)))
        mixture = _experts(config, anatomy, config.shape.experts), _expert_neurons(config, anatomy)
        return Student(partway(teacher, shape, done, rounds), None, None, *mixture)
    if config.budget.of_tokens_alone:
        return Student(teacher)
    if config.budget.axes == "experts":
        count, made = _experts_budgeted(config, anatomy)
        return Student(teacher, None, made if done == rounds else None, _experts(config, anatomy, count))
    if not (config.budget.total or config.budget.active_parameters or config.budget.bytes):
        remedy = "set shape.*, budget.axes=experts, budget.total or budget.active_parameters"
        check_counted(teacher, "budget.parameters", remedy)
    if config.plan.widths != "uniform":
        weights = _weights(config, anatomy, done / rounds)
        even = even_widths(anatomy.sizes, weights, multiples_for(teacher).neurons)
        sizes = replace(anatomy.sizes, layers=tuple(even))
        return Student(ModelShape.of(anatomy.narrowed(sizes, anatomy.layer_types)), weights)
    shape, budget = _budgeted(config, anatomy, teacher)
    return Student(partway(teacher, shape, done, rounds), None, budget if done == rounds else None)


def _budgeted(config: Config, anatomy: Anatomy, teacher: ModelShape) -> tuple[ModelShape, Budgeted | None]:
    """Return the shape that budget.* determines and what it reaches; None for limits that name no single size."""
    budget = config.budget
    if budget.predicted:
        chip, serving = Chip(**config.device.chip_facts), Serving(**config.shape_search.serving)
        shape = shape_within(chip, teacher, serving, Limits(**budget.limits))
        return shape, speedup_of(chip, teacher, serving, budget.speedup, shape) if budget.speedup else None
    if budget.total or budget.active_parameters or budget.bytes:
        counted = _counted(config, anatomy)
        active = budget.active_parameters is not None
        size = getattr(torch, config.export.dtype).itemsize if budget.bytes else 1
        unit = Unit(size, (budget.context or 0) * 2 * anatomy.sizes.head_size * size, active)
        (name, requested), *_ = budget.sized.items()
        whole = anatomy.active_parameters() if active else anatomy.parameters()
        most = requested if budget.bytes else requested * whole[0]
        shape, made = shape_of_size(counted, teacher, name, requested, most, unit, budget.axes)
        return shape, replace(made, context=budget.context or 0)
    fraction = budget.parameters or budget.fallback
    shape = BUDGET_AXES[budget.axes](teacher, fraction)
    return shape, parameters_of(teacher, fraction, shape, budget.axes)


def _weights(config: Config, anatomy: Anatomy, part: float) -> int:
    """Return the weights that layers of different widths may hold after a part, in (0, 1], of the way to the budget."""
    budget, everything = config.budget, anatomy.parameters()[0]
    if not budget.total and not budget.bytes:
        return weights_within(anatomy, 1.0 - (1.0 - (budget.parameters or budget.fallback)) * part)
    if budget.bytes:
        most, name = budget.bytes / getattr(torch, config.export.dtype).itemsize, "bytes"
    else:
        most, name = (budget.total or 1.0) * everything, "total"
    counted = _counted(config, anatomy).parameters()[0]
    return weights_of_size(anatomy.sizes, counted, counted - (counted - min(most, counted)) * part, name)


def _counted(config: Config, anatomy: Anatomy) -> Anatomy:
    """Return the tensors of a student that keeps every width: with the biases and the matrix that settings add."""
    counted = biased_anatomy(anatomy) if config.reinit.bias_compensation else anatomy
    return replace(counted, tied=anatomy.tied and not _unties(config))


def _unties(config: Config) -> bool:
    return config.rotate.kind == "principal" and config.rotate.tie == "untied"


def _experts_budgeted(config: Config, anatomy: Anatomy) -> tuple[int, Budgeted]:
    """Return the experts per layer that budget.* leaves, the other axes being the teacher's, and what they reach."""
    budget = config.budget
    (name, requested), *_ = (budget.sized or {"parameters": budget.fallback}).items()
    size = getattr(torch, config.export.dtype).itemsize if budget.bytes else 1
    unit = Unit(size, (budget.context or 0) * 2 * anatomy.sizes.head_size * size)
    count, made = experts_for(_counted(config, anatomy), name, requested, unit, anatomy)
    return count, replace(made, context=budget.context or 0)


def _experts(config: Config, anatomy: Anatomy, wanted: int | None) -> int | None:
    """Return the experts of a layer after this round; None where all stay. Raise ValueError where they cannot."""
    routing = anatomy.routing
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


def _expert_neurons(config: Config, anatomy: Anatomy) -> int | None:
    """Return the neurons of an expert after this round; None where all stay. Raise ValueError where they cannot."""
    wanted = config.shape.expert_neurons
    if wanted is None:
        return None
    check_expert_neurons(anatomy)
    most = anatomy.sizes.carried["x"]
    if wanted > most:
        raise ValueError(
            f"shape.expert_neurons: {wanted} is outside 1..{most} (the teacher's); choose a number of these"
        )
    done, rounds = config.recipe.part
    return wanted + (most - wanted) * (rounds - done) // rounds


def _kept(anatomy: Anatomy, student: Student) -> tuple[float, float]:
    """Return the shares of the parameters outside the embeddings, and of those a token uses, that a student keeps.

    Of the layers, as many of the first ones are counted.
    """
    count, sizes = student.shape.layers, anatomy.sizes
    layers = tuple(
        LayerSizes(student.shape.heads, student.shape.groups, student.shape.neurons).within(own)
        for own in sizes.layers[:count]
    )
    narrow = anatomy.narrowed(replace(sizes, hidden=student.shape.hidden, layers=layers), anatomy.layer_types[:count])
    made = with_experts(narrow, student.experts or sizes.carried["e"], student.expert_neurons)
    pairs = ((made.parameters(), anatomy.parameters()), (made.active_parameters(), anatomy.active_parameters()))
    shares = [some[1] / whole[1] for some, whole in pairs]
    return shares[0], shares[1]


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
