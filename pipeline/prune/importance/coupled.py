"""Coupled structures: which weights are removed together.

A KV group is coupled with its own queries, head h with group h // q; a neuron is its gate and up rows and down column.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.prune.importance.score import Units

AXES = ("n d", "k d", "f")  # of which coupled structures are made


def coupled(anatomy: Anatomy, terms: Callable[[str], Tensor]) -> Units:
    """Return per layer the sums of `terms`, one number per weight of a named tensor, over heads [n] and neurons [f].

    A head has its query rows and output columns and its share 1 / q of its group's keys and values, so that the heads
    of a group add up to the group. Biases of W_O and W_down belong to no structure.
    """
    heads, neurons = [], []
    for layer, widths in enumerate(anatomy.sizes.layers):
        totals = {axis: torch.zeros(anatomy.sizes.length(axis, layer), dtype=torch.float64) for axis in AXES}
        for pattern, segments in anatomy.layer_tensors.items():
            if not set(segments[0]) & set(AXES):
                continue
            lengths = [anatomy.sizes.length(segment[0], layer) for segment in segments]
            parts = terms(pattern.format(layer=layer)).to(torch.float64).split(lengths)
            for segment, part in zip(segments, parts, strict=True):
                axis = next(axis for axis in segment if axis in AXES)
                totals[axis] += part if part.ndim == 1 else part.sum(1 - segment.index(axis))
        queries, keys = (totals[axis].unflatten(0, (-1, anatomy.sizes.head_size)).sum(1) for axis in ("n d", "k d"))
        heads_per_group = widths.heads // widths.groups
        heads.append(queries + keys.repeat_interleave(heads_per_group) / heads_per_group)
        neurons.append(totals["f"])
    return Units(tuple(heads), tuple(neurons))
