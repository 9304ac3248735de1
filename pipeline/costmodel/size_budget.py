"""Budgets of size: what every shape a student can have weighs, counted exactly, and the shape that suits a budget.

Parameters are counted from the family's table, with all biases, norms and experts, not by the chip model's formula.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.costmodel.shapes import AXES, FILL, Grid, ModelShape, imbalance, multiples_for
from pipeline.model.anatomy import Anatomy
from pipeline.model.shape import Budgeted, Reachable
from pipeline.model.sizes import LayerSizes

NEAR = 0.01  # share of a budget that a shape may leave unused for the sake of balance
FREE = {"all": AXES, "layers": ("layers",), "neurons": ("neurons",)}  # by budget.axes: the axes that may change


@dataclass(frozen=True)
class Unit:
    """What a size is counted in: parameters times `bytes`, and per layer and KV group `cached` bytes of a KV cache.

    `active`: of the experts of a layer, only those that a token is sent to are counted. `inner`: the embedding and
    output matrices are not counted. Every layer caches the whole context; `cached` is context x 2 x head size x bytes
    of an element.
    """

    bytes: int = 1
    cached: int = 0
    active: bool = False
    inner: bool = False


def check_cache(anatomy: Anatomy) -> None:
    """Raise ValueError where the keys and values that a model caches are not those of KV groups of one head size."""
    axes = {axis for segments in anatomy.layer_tensors.values() for each in segments for axis in each}
    if not any("k" in axis.split() for axis in axes):
        raise ValueError(
            f"budget.context: the cache of model_type {anatomy.family.model_type!r} is not that of KV groups of one "
            "head size, so it is not counted; leave budget.context out"
        )


def sizes(anatomy: Anatomy, grid: Grid, unit: Unit) -> np.ndarray:
    """Return the size of every shape of a grid, [layers, hidden, (heads, groups), neurons].

    Where layers differ, of those that a student may have the largest count, whichever will stay.
    """
    hidden, neurons = grid.hidden[:, None, None], grid.neurons[None, None, :]
    heads, groups = (grid.attention[None, :, column, None] for column in (0, 1))
    known: dict[Any, np.ndarray] = {}
    layers = []
    for layer, own in enumerate(anatomy.sizes.layers):
        key = (own, anatomy.layer_types[layer], *(lengths[layer] for lengths in anatomy.sizes.by_layer.values()))
        if key not in known:
            known[key] = _layer(anatomy, layer, _within(own, heads, groups, neurons), hidden, unit)
        layers.append(known[key])
    most = np.sort(np.stack(layers), axis=0)[::-1].cumsum(axis=0)  # of 1, 2, ... layers
    outer = np.stack([_outer(anatomy, hidden, count, unit.inner) for count in grid.layers.tolist()])
    return most[grid.layers - 1] + outer * unit.bytes


def _within(own: LayerSizes, heads: np.ndarray, groups: np.ndarray, neurons: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays of widths bounded by those of a layer, as `LayerSizes.within`."""
    kept = np.minimum(groups, own.groups)
    each = np.minimum(heads // groups, own.each)
    return {"heads": kept * each, "groups": kept, "neurons": np.minimum(neurons * own.neuron_factor, own.neurons)}


def _layer(anatomy: Anatomy, layer: int, widths: Mapping[str, Any], hidden: Any, unit: Unit) -> np.ndarray:
    """Return the size of one layer for arrays of widths, [hidden, (heads, groups), neurons]."""
    every = replace(anatomy.sizes, hidden=hidden, layers=(LayerSizes(**widths),) * len(anatomy.sizes.layers))
    counts = {
        name: math.prod(anatomy.shape(axes, layer, every))
        for name, axes in anatomy.layer_tensors.items()
        if anatomy.has(name, layer)
    }
    count = sum(counts.values())
    if unit.active and anatomy.routing is not None:
        count -= anatomy.idle(sum(own for name, own in counts.items() if name in anatomy.routed))
    size = count * unit.bytes + widths["groups"] * unit.cached
    return np.broadcast_to(size, np.broadcast_shapes(hidden.shape, *(each.shape for each in widths.values())))


def _outer(anatomy: Anatomy, hidden: Any, layers: int, inner: bool) -> np.ndarray:
    """Return the parameters outside the layers of a student of some layers, by hidden size; `inner`: without the
    embedding and output matrices."""
    every = replace(anatomy.sizes, hidden=hidden, layers=anatomy.sizes.layers[:layers])
    counted = [axes for name, axes in anatomy.outer_tensors.items() if not (inner and name in anatomy.matrices)]
    counts = (math.prod(anatomy.shape(axes, 0, every)) for axes in counted)
    return np.broadcast_to(sum(counts, np.zeros((), dtype=np.int64)), hidden.shape)


def shape_of_size(
    anatomy: Anatomy, teacher: ModelShape, budget: str, requested: float, most: float, unit: Unit, axes: str
) -> tuple[ModelShape, Budgeted]:
    """Return the shape that suits a budget, and what it reaches beside the shapes next to the budget.

    Among all axes: of the aligned shapes that use 99 % of the budget (where there are none, of the fullest), the one of
    least Σ_axes ln²(kept share of the axis / kept^lean) + 4 ln²(used / budget), as `shapes.shape_for`. Among layers or
    neurons alone: the fullest.

    Args:
        anatomy: the tensors that a student of the teacher's shape has.
        budget: the name of the setting, `requested` its value, `most` the size that it allows, in `unit`.

    Raises:
        ValueError: where even the smallest shape is larger; it names the reachable range.
    """
    grid = Grid(teacher, multiples_for(teacher))
    found, free = sizes(anatomy, grid, unit), grid.accepted & _free(grid, teacher, axes)
    scale = requested / most
    fits = free & (found <= most)
    if not fits.any():
        least, largest = (float(edge(found[free])) * scale for edge in (np.min, np.max))
        raise ValueError(
            f"budget.{budget}: {requested:g} cannot be reached; this model reaches {least:.4g} to {largest:.4g}"
        )
    fullest = found[fits].max()
    window = fits & (found >= (fullest if axes != "all" else min((1.0 - NEAR) * most, fullest)))
    rows, counts = grid.rows(window)
    kept = counts / teacher.non_embedding_parameters()
    unused = np.log(found[window] / most) ** 2
    distance = imbalance(teacher, rows, kept) + FILL * unused
    best = int(np.lexsort((-rows[:, 1], -rows[:, 0], unused, distance.round(12)))[0])
    made = Choice(teacher, grid, free).budgeted(found, most, budget, requested, found[window][best])
    return _shape(teacher, rows[best]), made


@dataclass(frozen=True)
class Choice:
    """The shapes among which a budget chooses: a mask over a grid."""

    teacher: ModelShape
    grid: Grid
    free: np.ndarray

    def budgeted(
        self, values: np.ndarray, limit: float, budget: str, requested: float, reached: float, least: bool = False
    ) -> Budgeted:
        """Return what a budget reached, with the reachable shapes next to it on both sides.

        `values`: of every shape of the grid, in the unit of `limit` and `reached`; `requested`: the limit in the unit
        of the setting; `least`: values are to be at least the limit instead of at most.
        """
        scale = requested / limit
        meets = self.free & ((values >= limit) if least else (values <= limit))
        misses = self.free & ~meets
        first, second = (np.min, np.max) if least else (np.max, np.min)
        within = self._reachable(meets, values, first(values[meets]), scale)
        beyond = self._reachable(misses, values, second(values[misses]), scale) if misses.any() else None
        return Budgeted(budget, requested, float(reached * scale), within, beyond)

    def _reachable(self, mask: np.ndarray, values: np.ndarray, value: float, scale: float) -> Reachable:
        """Return the shape under a mask that has a value; of several the one with the most parameters."""
        rows, counts = self.grid.rows(mask & (values == value))
        return Reachable(float(value * scale), _shape(self.teacher, rows[int(counts.argmax())]).axes())


def parameters_of(teacher: ModelShape, fraction: float, chosen: ModelShape, axes: str) -> Budgeted:
    """Return what budget.parameters reached: the share of the parameters outside the embeddings.

    Among neurons alone a budget is met to a thousandth, as `shapes.neurons_for`.
    """
    grid, reached = Grid(teacher, multiples_for(teacher)), chosen.non_embedding_parameters()
    limit = max(fraction * teacher.non_embedding_parameters(), reached)
    free = _free(grid, teacher, axes)
    choice = Choice(teacher, grid, free & grid.accepted if axes == "all" else free)
    made = choice.budgeted(grid.counts, limit, "parameters", limit / teacher.non_embedding_parameters(), reached)
    return replace(made, requested=fraction)


def _free(grid: Grid, teacher: ModelShape, axes: str) -> np.ndarray:
    """Return which shapes of a grid differ from the teacher in nothing but the axes that a budget narrows."""
    same = {
        "layers": (grid.layers == teacher.layers)[:, None, None, None],
        "hidden": (grid.hidden == teacher.hidden)[:, None, None],
        "heads": (grid.attention == (teacher.heads, teacher.groups)).all(axis=1)[:, None],
        "neurons": grid.neurons == teacher.neurons,
    }
    mask = np.ones(grid.counts.shape, dtype=bool)
    for axis, equal in same.items():
        if axis not in FREE[axes]:
            mask &= equal
    return mask


def _shape(teacher: ModelShape, row: np.ndarray) -> ModelShape:
    return replace(teacher, **dict(zip(AXES, row.tolist(), strict=True)))
