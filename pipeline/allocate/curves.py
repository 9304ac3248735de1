"""Widths layer by layer from what narrowing each layer alone was measured to cost."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from pipeline.allocate.budgets import group_weights, layer_weights
from pipeline.model.anatomy import LayerSizes, Sizes

Curve = Sequence[tuple[int, float]]  # units removed, ascending from 0, and the loss then


@dataclass(frozen=True)
class Way:
    """The steps by which one kind of unit of one layer goes, and what they cost."""

    left: tuple[int, ...]  # units before and after each step, descending from all of them
    weights: int  # of a unit
    slopes: tuple[float, ...]  # loss a weight of each step, never falling

    def freed(self, step: int) -> int:
        """Give the weights of a step."""
        return (self.left[step] - self.left[step + 1]) * self.weights


def removals(units: int, levels: Sequence[float], most: int) -> list[int]:
    """Give how many of some units are removed at levels, shares of them: whole ones, halves up, 1 to `most`."""
    counts = {min(int(level * units + 0.5), most) for level in levels}
    return sorted(counts - {0})


def curves_of(rows: Sequence[Mapping[str, Any]], layer: int) -> tuple[list[tuple[int, float]], ...]:
    """Give a layer's curves of KV groups and of neurons, from rows {layer, kind, removed, loss}.

    The row of no layer holds the loss with nothing removed. A loss that is no number ends its curve.
    """
    (whole,) = (row["loss"] for row in rows if row["layer"] is None)
    found = []
    for kind in ("groups", "neurons"):
        measured = sorted((row["removed"], row["loss"]) for row in rows if (row["layer"], row["kind"]) == (layer, kind))
        ends = next((place for place, (_, loss) in enumerate(measured) if not isfinite(loss)), len(measured))
        found.append([(0, whole), *measured[:ends]])
    return tuple(found)


def lower_hull(curve: Curve) -> list[tuple[int, float]]:
    """Give the corners of the largest convex function that is nowhere above a curve's points."""
    hull: list[tuple[int, float]] = []
    for x, y in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def measured_widths(
    sizes: Sizes, groups: Sequence[Curve], neurons: Sequence[Curve], weights: int, multiple: int
) -> list[LayerSizes]:
    """Give the widths whose curves, added up, promise the least loss with at most `weights` weights in the layers.

    Every curve is replaced by its lower hull, linear between its corners. Then steps are taken, of one KV group or one
    multiple of neurons, each time the one of least loss a weight: for convex curves that add up this is the best choice
    there is, but for the last step, which may free more than was asked. What then fits again is given back, the latest
    first, so that less than one step is missing. A group and a multiple stay in every layer, and nothing goes beyond
    what was measured. ValueError where that keeps more than `weights`.
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
    """Give the loss between two corners of a hull."""
    for first, last in zip(hull, hull[1:]):
        if removed <= last[0]:
            return first[1] + _slope(first, last) * (removed - first[0])
    return hull[-1][1]


def _slope(first: tuple[int, float], last: tuple[int, float]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])
