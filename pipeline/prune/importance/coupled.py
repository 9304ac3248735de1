"""Coupled structures: which weights are removed together.

A KV group is coupled with its own queries, head h with group h // q; a neuron is its gate and up rows and down column.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.sizes import Segment, Sizes, joint
from pipeline.prune.importance.score import Units

UNITS = frozenset("nkf")  # letters of the axes of which coupled structures are made


def coupled(anatomy: Anatomy, terms: Callable[[str], Tensor]) -> Units:
    """Return per layer the sums of `terms`, one number per weight of a named tensor, over heads [n] and neurons [f].

    A head has its query rows and output columns and its share 1 / q of its group's keys and values, so that the heads
    of a group add up to the group. Biases of W_O and W_down belong to no structure.
    """
    heads, neurons = [], []
    for layer, widths in enumerate(anatomy.sizes.layers):
        each = widths.each
        totals = {
            letter: torch.zeros(length, dtype=torch.float64)
            for letter, length in (("n", widths.heads), ("k", widths.groups), ("f", widths.neurons))
        }
        for pattern, segments in anatomy.layer_tensors.items():
            if not anatomy.has(pattern, layer) or not is_coupled(segments):
                continue
            along = joint(segments)
            lengths = [anatomy.sizes.length(segment[along], layer) for segment in segments]
            parts = terms(pattern.format(layer=layer)).to(torch.float64).split(lengths, along)
            for segment, part in zip(segments, parts, strict=True):
                for letter, sums in _sums(segment, part, anatomy.sizes, layer):
                    totals[letter] += sums
        heads.append(totals["n"] + totals["k"].repeat_interleave(each) / each)
        neurons.append(totals["f"])
    return Units(tuple(heads), tuple(neurons))


def is_coupled(segments: tuple[Segment, ...]) -> bool:
    """Return whether a tensor of these segments belongs to heads, KV groups or neurons."""
    return any(_axis_of(segment) is not None for segment in segments)


def _axis_of(segment: Segment) -> int | None:
    return next((i for i, axis in enumerate(segment) if UNITS & set(axis.split())), None)


def _sums(segment: Segment, part: Tensor, sizes: Sizes, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yield sums over each head (`n`), KV group (`k`) or neuron (`f`) of a segment, by the letter of the unit."""
    index = _axis_of(segment)
    if index is None:
        return
    letters = segment[index].split()
    grid = part.movedim(index, 0).flatten(1).sum(1) if part.ndim > 1 else part
    grid = grid.view([sizes.length(letter, layer) for letter in letters])
    unit = next(letter for letter in letters if letter in UNITS)
    rows = grid.movedim(letters.index(unit), 0)
    if "q+2" in letters:  # of each group: its query heads, its key, its value
        rows = rows.flatten(2).sum(2) if rows.ndim > 2 else rows
        yield "n", rows[:, :-2].flatten()
        rows = rows[:, -2:]
    yield unit, rows.flatten(1).sum(1) if rows.ndim > 1 else rows
