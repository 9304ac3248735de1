"""Width policies: how wide each layer that stays is, by the name that `plan.widths` selects.

A policy is one function from `PolicyInputs` to the widths of the layers that stay, and an entry of `WIDTH_POLICIES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from pipeline.allocate.budgets import layer_weights
from pipeline.allocate.curves import Sensitivities, measured_widths
from pipeline.allocate.widths import Sparsities, adaptive_widths, widths_above
from pipeline.config import Config
from pipeline.costmodel.shapes import ModelShape, multiples_for
from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.shape import Shape, Widths
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.prune.importance.score import standardised
from pipeline.stages.models import checkpoint
from pipeline.stages.stage import Inputs


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy is given: the subject, its scores, the layers that stay and the student's shape."""

    config: Config
    inputs: Inputs
    out: Path
    anatomy: Anatomy
    scores: Scores
    hosts: Sequence[int]
    shape: Shape

    @property
    def even(self) -> list[LayerSizes]:
        """The widths of the shape, for every layer that stays."""
        return [self.shape.widest.within(self.anatomy.sizes.layers[host]) for host in self.hosts]

    @property
    def sizes(self) -> Sizes:
        """The sizes of the subject with the student's hidden size and the layers that stay."""
        layers = tuple(self.anatomy.sizes.layers[host] for host in self.hosts)
        return replace(self.anatomy.sizes, hidden=self.shape.hidden, layers=layers)

    @property
    def weights(self) -> int:
        """The weights that the layers may hold together."""
        return layer_weights(self.sizes, self.even) if self.shape.weights is None else self.shape.weights

    @cached_property
    def teacher(self) -> Anatomy:
        """The anatomy of the model that the first round prunes."""
        return checkpoint(self.config, self.inputs["teacher"]).anatomy

    @property
    def multiple(self) -> int:
        """What numbers of neurons are multiples of."""
        return multiples_for(ModelShape.of(self.teacher)).neurons


Policy = Callable[[PolicyInputs], list[LayerSizes]]


def uniform(task: PolicyInputs) -> list[LayerSizes]:
    """Return the same widths for every layer: those of the shape."""
    return task.even


def threshold(task: PolicyInputs) -> list[LayerSizes]:
    """Return the widths that one threshold on standardised scores leaves (FLAP)."""
    heads, neurons = standardised(task.scores, task.hosts)
    return widths_above(task.sizes, heads, neurons, task.weights, task.multiple)


def measured(task: PolicyInputs) -> list[LayerSizes]:
    """Return the widths of least predicted loss, from the measured loss of narrowing each layer."""
    sensitivities = Sensitivities.load(task.inputs["sensitivities"])
    curves = [sensitivities.curves(host) for host in task.hosts]
    groups, neurons = zip(*curves, strict=True)
    return measured_widths(task.sizes, groups, neurons, task.weights, task.multiple)


def evolved(task: PolicyInputs) -> list[LayerSizes]:
    """Return the widths for which the supernet stage solved the weights."""
    widths = Widths.load(task.inputs["restored"]).layers
    return [widths[host] for host in task.hosts]


def adaptive(task: PolicyInputs) -> list[LayerSizes]:
    """Return the widths after this round's steps of Adapt-Pruner; write the sparsities for the next round."""
    total = len(task.anatomy.sizes.layers)
    places, sparsities = list(range(total)), [0.0] * total
    if "previous_blueprint" in task.inputs:
        previous = task.inputs["previous_blueprint"]
        places = [plan.host for plan in Blueprint.load(previous).layers]
        sparsities = list(Sparsities.load(previous).layers)
    widths, after = adaptive_widths(
        replace(task.sizes, layers=tuple(task.teacher.sizes.layers[places[host]] for host in task.hosts)),
        task.sizes.layers,
        torch.tensor([sparsities[host] for host in task.hosts], dtype=torch.float64),
        task.scores.layers[list(task.hosts)],
        task.weights,
        amplitude=task.config.plan.amplitude,
        steps=task.config.plan.steps,
        multiple=task.multiple,
    )
    Sparsities(tuple(after.tolist())).save(task.out)
    return widths


WIDTH_POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "adaptive": adaptive,
    "threshold": threshold,
    "measured": measured,
    "evolved": evolved,
}
