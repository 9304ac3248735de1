"""Widths of each layer within a number of weights, and the shapes of rounds before the last.

Weights are those of Q, K, V, O, gate, up and down (`budgets.layer_weights`).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.allocate.budgets import MOST, adapted, layer_weights, threshold_widths, uniform_widths, widths_at
from pipeline.costmodel.nearest_shape import possible_near
from pipeline.costmodel.shapes import ModelShape, multiples_for
from pipeline.model.anatomy import Anatomy
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.model.stored import Stored

FINE = 2000  # shifts of all sparsities tried, a unit of sparsity


@dataclass(frozen=True)
class Sparsities(Stored):
    """The sparsity of each layer that stays, relative to the teacher's (Adapt-Pruner)."""

    FILE: ClassVar[str] = "sparsities.json"

    layers: tuple[float, ...]


def weights_within(anatomy: Anatomy, fraction: float) -> int:
    """Return the weights the layers may hold together so that `fraction` of the parameters outside the embeddings
    stays.

    All channels and layers stay. Raise ValueError where their norms alone are more.
    """
    inner, whole = anatomy.parameters()[1], layer_weights(anatomy.sizes, anatomy.sizes.layers)
    left = math.floor(fraction * inner) - (inner - whole)
    if left <= 0:
        raise ValueError(
            f"budget.parameters is {fraction}; what is not in heads and neurons is {1 - whole / inner:.4f}"
        )
    return left


def weights_of_size(sizes: Sizes, everything: int, limit: float, budget: str) -> int:
    """Return the weights the layers may hold together so that at most `limit` of all parameters stays.

    `everything`: the parameters of a student that keeps all channels, layers, heads and neurons, embeddings included.
    Raise ValueError, naming the setting `budget`, where what is in no head and neuron is more.
    """
    rest = everything - layer_weights(sizes, sizes.layers)
    left = math.floor(limit) - rest
    if left <= 0:
        raise ValueError(
            f"budget.{budget}: cannot be reached: {rest / everything:.4g} of the parameters are in no head or neuron, "
            f"and plan.widths keeps them; raise it above {rest / everything:.4g} of the model"
        )
    return left


def even_widths(sizes: Sizes, weights: int, multiple: int) -> list[LayerSizes]:
    """Return the widest layers of one sparsity, KV groups whole and neurons in multiples, that hold at most
    `weights`."""
    lowest = _least_shift(sizes, lambda shift: uniform_widths(sizes.layers, max(0.0, shift), multiple), weights)
    return uniform_widths(sizes.layers, max(0.0, lowest), multiple)


def adaptive_widths(
    original: Sizes,
    now: Sequence[LayerSizes],
    sparsities: Tensor,
    influence: Tensor,
    weights: int,
    *,
    amplitude: float,
    steps: int,
    multiple: int,
) -> tuple[list[LayerSizes], Tensor]:
    """Return the widths after `steps` steps of Adapt-Pruner (2502.03460), and the sparsities [layer] they come from.

    Sparsities are relative to the original layers. The step is what `weights` needs beyond the sparsities so far,
    divided by the number of steps, which all use one influence. Rounding to whole KV groups and multiples of neurons is
    corrected by one shift of all layers, and what still fits is given to the least sparse layers first. No layer gets
    wider than it is `now`. Raise ValueError if the amplitude is larger than the step, or no widths fit.
    """
    costs = torch.tensor([layer_weights(original, [layer]) for layer in original.layers], dtype=torch.float64)
    target = 1.0 - weights / float(costs.sum())
    step = (target - float((sparsities * costs).sum() / costs.sum())) / steps
    for _ in range(steps):
        sparsities = adapted(sparsities, influence, step, amplitude)

    def at(shift: float) -> list[LayerSizes]:
        wanted = widths_at(original.layers, (sparsities + shift).clamp(0.0, MOST), multiple)
        return [layer.within(own) for layer, own in zip(wanted, now, strict=True)]

    lowest = _least_shift(original, at, weights)
    widths, wider = at(lowest), at(lowest - 1.0 / FINE)
    for layer in sparsities.argsort(stable=True).tolist():
        tried = [*widths[:layer], wider[layer], *widths[layer + 1 :]]
        if layer_weights(original, tried) <= weights:
            widths = tried
    return widths, sparsities


def widths_above(
    sizes: Sizes, heads: Sequence[Tensor], neurons: Sequence[Tensor], weights: int, multiple: int
) -> list[LayerSizes]:
    """Return the widths that one threshold on standardised scores of heads [n] and neurons [f] leaves (FLAP).

    A KV group has the mean of its heads. Raise ValueError as `threshold_widths`.
    """
    pairs = zip(heads, sizes.layers, strict=True)
    groups = [scores.unflatten(0, (layer.groups, -1)).mean(1) for scores, layer in pairs]
    return threshold_widths(sizes, groups, neurons, weights / layer_weights(sizes, sizes.layers), multiple)


def partway(teacher: ModelShape, student: ModelShape, done: int, rounds: int) -> ModelShape:
    """Return the shape after `done` of `rounds` equal parts of the way, in the multiples that suit the teacher.

    Where the class of the students refuses that, the nearest one that is no wider than after the part before.
    """
    if done in (0, rounds):
        return student if done else teacher
    multiples = multiples_for(teacher)

    def between(first: int, last: int, multiple: int = 1) -> int:
        nearest = int((first + (last - first) * done / rounds) / multiple + 0.5) * multiple
        return max(last, min(first, nearest))

    groups = between(teacher.groups, student.groups)
    wanted = {
        "layers": between(teacher.layers, student.layers),
        "hidden": between(teacher.hidden, student.hidden, multiples.hidden),
        "heads": groups * between(teacher.heads // teacher.groups, student.heads // student.groups),
        "groups": groups,
        "neurons": between(teacher.neurons, student.neurons, multiples.neurons),
    }
    before = partway(teacher, student, done - 1, rounds)
    return possible_near(before, wanted, count=1, least=student)[0]


def _least_shift(sizes: Sizes, at: Callable[[float], list[LayerSizes]], weights: int) -> float:
    """Return the smallest shift of sparsities, in steps of 1 / FINE, whose widths hold at most `weights`."""
    shifts = range(-FINE, FINE + 1)
    place = bisect_left(shifts, True, key=lambda shift: layer_weights(sizes, at(shift / FINE)) <= weights)
    if place == len(shifts):
        least = layer_weights(sizes, at(1.0))
        raise ValueError(
            f"the layers may hold {weights} weights together and cannot hold fewer than {least}; allow more"
        )
    return shifts[place] / FINE
