"""The student's shape as settings determine it: given, or the one that suits a budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pipeline.allocate.widths import even_widths, partway, weights_of_size, weights_within
from pipeline.config import Config
from pipeline.costmodel.chip import Chip
from pipeline.costmodel.expert_budget import experts_for, with_experts
from pipeline.costmodel.expert_speed import experts_for_speed
from pipeline.costmodel.nearest_shape import given_shape
from pipeline.costmodel.pareto import Limits, Serving, shape_within, speedup_of
from pipeline.costmodel.shapes import AXES, ModelShape, depth_for, multiples_for, neurons_for, shape_for
from pipeline.costmodel.size_budget import Unit, check_cache, parameters_of, shape_of_size
from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import check_expert_neurons
from pipeline.model.mixture import narrowing_of
from pipeline.model.shape import Budgeted
from pipeline.model.sizes import LayerSizes
from pipeline.prune.surgery.bias import biased_anatomy


def unchanged(teacher: ModelShape, fraction: float) -> ModelShape:
    """Return the teacher's shape, whose experts alone a budget narrows."""
    return teacher


GROUPED = 8  # elements of a 16-bit type in the 16 bytes of which torch's grouped matrix product takes multiples
# By budget.axes: (teacher, fraction of its non-embedding parameters) -> student.
BUDGET_AXES: dict[str, Callable[[ModelShape, float], ModelShape]] = {
    "all": shape_for,
    "layers": depth_for,
    "neurons": neurons_for,
    "experts": unchanged,  # `experts_for` counts them
    "sublayers": unchanged,  # the stage sublayers removes them
}


@dataclass(frozen=True)
class SizeLimit:
    """A budget of a student that keeps every width of its layers, and the size that it allows, counted in `unit`."""

    name: str  # of budget.*
    requested: float
    most: float
    unit: Unit
    counted: Anatomy  # with the biases and the matrix that settings add

    def size(self, student: Anatomy) -> float:
        """Return the size of a student."""
        parameters = student.parameters()[int(self.name == "parameters")]
        return parameters * self.unit.bytes + sum(w.groups for w in student.sizes.layers) * self.unit.cached

    def shown(self, size: float) -> str:
        """Return a size as the setting states it."""
        return f"{size / self.most * self.requested:.4g}"


@dataclass(frozen=True)
class Student:
    """This round's shape; where layers get widths of their own within a budget, the weights they may hold; in the last
    round, what a budget for equal layers reached; and the experts of a layer, the neurons of each and those of shared
    experts, None where all stay."""

    shape: ModelShape
    weights: int | None = None
    budget: Budgeted | None = None
    experts: int | None = None
    expert_neurons: int | None = None
    shared_neurons: int | None = None


def student_of(config: Config, anatomy: Anatomy) -> Student:
    """Return the student of this round."""
    done, rounds = config.recipe.part
    teacher = ModelShape.of(anatomy, config.reinit.bias_compensation, config.plan.keep_first)
    if config.shape.given:
        shape = given_shape(teacher, config.shape.model_dump(include=set(AXES)))
        mixture = _experts(config, anatomy, config.shape.experts), *_neurons(config, anatomy)
        return Student(partway(teacher, shape, done, rounds), None, None, *mixture)
    if config.budget.of_tokens_alone:
        return Student(teacher)
    if config.budget.axes == "sublayers":
        return Student(teacher)
    if config.budget.axes == "experts":
        count, made = _experts_budgeted(config, anatomy)
        return Student(teacher, None, made if done == rounds else None, _experts(config, anatomy, count))
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
    counted_by_shape = "heads" not in anatomy.family.fixed  # the formula of shapes knows heads and KV groups alone
    if budget.total or budget.active_parameters or budget.bytes or not counted_by_shape:
        counted = _counted(config, anatomy)
        active = budget.active_parameters is not None
        (name, requested), *_ = (budget.sized or {"parameters": budget.fallback}).items()
        inner = name == "parameters"
        unit = _unit(config, anatomy, active, inner)
        whole = anatomy.active_parameters() if active else anatomy.parameters()
        most = requested if budget.bytes else requested * whole[int(inner)]
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
    return replace(counted, tied=anatomy.tied and not unties(config))


def size_limit(config: Config, anatomy: Anatomy) -> SizeLimit:
    """Return the size that budget.* leaves a student, whose layers lose attentions and FFNs and no width."""
    (name, requested), *_ = (config.budget.sized or {"parameters": config.budget.fallback}).items()
    unit = _unit(config, anatomy)
    whole = 1.0 if name == "bytes" else anatomy.parameters()[int(name == "parameters")]
    return SizeLimit(name, requested, requested * whole, unit, _counted(config, anatomy))


def _unit(config: Config, anatomy: Anatomy, active: bool = False, inner: bool = False) -> Unit:
    """Return what budget.* counts a size in. ValueError where a cache is to be counted that is not of KV groups."""
    size = getattr(torch, config.export.dtype).itemsize if config.budget.bytes else 1
    context = config.budget.context or 0
    if context:
        check_cache(anatomy)
    return Unit(size, context * 2 * anatomy.sizes.head_size * size, active, inner)


def unties(config: Config) -> bool:
    return config.rotate.kind == "principal" and config.rotate.tie == "untied"


def _experts_budgeted(config: Config, anatomy: Anatomy) -> tuple[int, Budgeted]:
    """Return the experts per layer that budget.* leaves, the other axes being the teacher's, and what they reach."""
    budget = config.budget
    speedup = budget.predicted.get("speedup")
    if speedup is not None:
        chip, serving = Chip(**config.device.chip_facts), Serving(**config.shape_search.serving)
        return experts_for_speed(chip, ModelShape.of(anatomy), anatomy, serving, speedup)
    (name, requested), *_ = (budget.sized or {"parameters": budget.fallback}).items()
    unit = _unit(config, anatomy)
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


def _neurons(config: Config, anatomy: Anatomy) -> tuple[int | None, int | None]:
    """Return the neurons of a routed expert, and of shared experts, after this round; None where all stay.

    Where the config states both by one field, they change in the last round, since numbers between do not fit it.
    Raise ValueError where a student cannot have them.
    """
    inner, shared = config.shape.expert_neurons, config.shape.shared_neurons
    if inner is None and shared is None:
        return None, None
    check_expert_neurons(anatomy, inner, shared)
    _check_aligned(inner, anatomy.sizes.carried["x"])
    done, rounds = config.recipe.part
    coupled = narrowing_of(anatomy.family).coupled and anatomy.shared_writer is not None
    left = (int(done < rounds), 1) if coupled else (rounds - done, rounds)
    step = 1 if anatomy.sizes.carried["x"] % GROUPED else GROUPED
    return (
        None if inner is None else _partway(inner, anatomy.sizes.carried["x"], *left, step),
        None if shared is None else _partway(shared, anatomy.sizes.carried["y"], *left),
    )


def _check_aligned(inner: int | None, most: int) -> None:
    """Refuse neurons of an expert that the grouped matrix products of the classes do not take, as the teacher's are."""
    if inner is None or most % GROUPED or inner % GROUPED == 0:
        return
    near = [value for value in (inner // GROUPED * GROUPED, (inner // GROUPED + 1) * GROUPED) if value]
    raise ValueError(
        f"shape.expert_neurons: {inner} is no multiple of {GROUPED}, which grouped matrix products in 16-bit types "
        f"need; nearest: {' or '.join(map(str, near))}"
    )


def _partway(wanted: int, most: int, left: int, rounds: int, step: int = 1) -> int:
    """Return a width with `left` of `rounds` equal parts of the way from `most` to `wanted` still to do, rounded down
    to whole steps from `wanted`."""
    return wanted + (most - wanted) * left // (rounds * step) * step


def kept_shares(anatomy: Anatomy, student: Student) -> tuple[float, float]:
    """Return the shares of the parameters outside the embeddings, and of those a token uses, that a student keeps.

    Of layers that differ the largest are counted, whichever will stay.
    """
    shape, sizes = student.shape, anatomy.sizes
    widest = LayerSizes(shape.heads, shape.groups, shape.neurons)
    widths = [widest.within(own) for own in shape.own or sizes.layers]
    deep = anatomy.narrowed(replace(sizes, hidden=shape.hidden, layers=tuple(widths)), anatomy.layer_types)
    ranked = sorted(range(len(widths)), key=deep.layer_parameters, reverse=True)
    hosts = sorted(ranked[: shape.layers])
    few = deep.sizes.of_layers(hosts, (widths[host] for host in hosts))
    narrow = anatomy.narrowed(few, tuple(anatomy.layer_types[host] for host in hosts))
    made = narrow
    if anatomy.routing is not None:
        count = student.experts or sizes.carried["e"]
        made = with_experts(narrow, count, student.expert_neurons, student.shared_neurons)
    pairs = ((made.parameters(), anatomy.parameters()), (made.active_parameters(), anatomy.active_parameters()))
    shares = [some[1] / whole[1] for some, whole in pairs]
    return shares[0], shares[1]
