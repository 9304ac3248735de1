"""Widths layer by layer from the measured losses of narrowing each layer alone."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal

from pipeline.allocate.budgets import group_weights, layer_weights
from pipeline.model.sizes import LayerSizes, Sizes
from pipeline.model.stored import Stored

Curve = Sequence[tuple[int, float]]  # units removed, ascending from 0, and the loss then
Kind = Literal["groups", "neurons"]


@dataclass(frozen=True)
class Narrowing:
    """The loss of a model without `removed` units of a kind in one layer; layer None: with nothing removed."""

    layer: int | None
    kind: Kind | None
    removed: int
    loss: float


@dataclass(frozen=True)
class Sensitivities(Stored):
    """Every narrowing that was measured, the one that removes nothing first."""

    FILE: ClassVar[str] = "sensitivities.json"

    rows: tuple[Narrowing, ...]

    def curves(self, layer: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Return a layer's curves of KV groups and of neurons. A loss that is not finite ends its curve."""
        (whole,) = (row.loss for row in self.rows if row.layer is None)
        groups, neurons = (self._curve(layer, kind, whole) for kind in ("groups", "neurons"))
        return groups, neurons

    def _curve(self, layer: int, kind: str, whole: float) -> list[tuple[int, float]]:
        measured = sorted((row.removed, row.loss) for row in self.rows if (row.layer, row.kind) == (layer, kind))
        ends = next((place for place, (_, loss) in enumerate(measured) if not isfinite(loss)), len(measured))
        return [(0, whole), *measured[:ends]]


@dataclass(frozen=True)
class Way:
    """The steps in which units of one kind leave a layer, and what they cost."""

    left: tuple[int, ...]  # units before and after each step, descending from all of them
    weights: int  # of a unit
    slopes: tuple[float, ...]  # loss a weight of each step, never decreasing

    def freed(self, step: int) -> int:
        """Return the weights of a step."""
        return (self.left[step] - self.left[step + 1]) * self.weights


def removals(units: int, levels: Sequence[float], most: int) -> list[int]:
    """Return the numbers of units removed at `levels`, shares of `units`: rounded, halves up, from 1 to `most`."""
    counts = {min(int(level * units + 0.5), most) for level in levels}
    return sorted(counts - {0})


def lower_hull(curve: Curve) -> list[tuple[int, float]]:
    """Return the corners of the largest convex function that is nowhere above a curve's points."""
    hull: list[tuple[int, float]] = []
    for x, y in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def measured_widths(
    sizes: Sizes, groups: Sequence[Curve], neurons: Sequence[Curve], weights: int, multiple: int
) -> list[LayerSizes]:
    """Return the widths whose curves, added up, predict the least loss with at most `weights` weights in the layers.

    Every curve is replaced by its lower hull, linear between its corners. Then steps are taken, of one KV group or one
    multiple of neurons, each time the one of least loss a weight: for convex curves that add up this is the best choice
    there is, but for the last step, which may free more than required. What then fits again is given back, the latest
    first, so that less than one step is missing. A group and a multiple stay in every layer, and nothing goes beyond
    what was measured. Raise ValueError where that keeps more than `weights`.
    """
    curves = zip(sizes.layers, groups, neurons, strict=True)
    ways = [way for each in curves for way in _ways(sizes, *each, multiple)]
    done, taken = [0] * len(ways), []
    total = layer_weights(sizes, sizes.layers)
    queue = [(way.slopes[0], index) for index, way in enumerate(ways) if way.slopes]
    heapq.heapify(queue)
    while total > weights:
        if not queue:
            raise ValueError(
                f"the layers may hold {weights} weights together, and the measured levels leave {total}; allow more, "
                "or add a deeper level to sensitivity.levels"
            )
        _, index = heapq.heappop(queue)
        total -= ways[index].freed(done[index])
        done[index] += 1
        taken.append(index)
        if done[index] < len(ways[index].slopes):
            heapq.heappush(queue, (ways[index].slopes[done[index]], index))
    refused = set()
    for index in reversed(taken):
        freed = ways[index].freed(done[index] - 1)
        if index in refused or total + freed > weights:
            refused.add(index)
            continue
        total += freed
        done[index] -= 1
    left = [way.left[steps] for way, steps in zip(ways, done, strict=True)]
    return [
        LayerSizes(kept * (layer.heads // layer.groups), kept, own)
        for layer, kept, own in zip(sizes.layers, left[::2], left[1::2], strict=True)
    ]


def _ways(sizes: Sizes, widths: LayerSizes, groups: Curve, neurons: Curve, multiple: int) -> tuple[Way, Way]:
    narrower = range((widths.neurons - 1) // multiple * multiple, 0, -multiple)
    return (
        _way(range(widths.groups, 0, -1), group_weights(sizes, widths), groups),
        _way((widths.neurons, *narrower), 3 * sizes.hidden, neurons),
    )


def _way(left: Sequence[int], weights: int, curve: Curve) -> Way:
    whole, hull = left[0], lower_hull(curve)
    left = tuple(units for units in left if whole - units <= hull[-1][0])
    losses = [_at(hull, whole - units) for units in left]
    steps = zip(left, left[1:], losses, losses[1:])
    return Way(left, weights, tuple((after - before) / ((a - b) * weights) for a, b, before, after in steps))


def _at(hull: Curve, removed: int) -> float:
    """Return the loss between two corners of a hull."""
    for first, last in zip(hull, hull[1:]):
        if removed <= last[0]:
            return first[1] + _slope(first, last) * (removed - first[0])
    return hull[-1][1]


def _slope(first: tuple[int, float], last: tuple[int, float]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])
