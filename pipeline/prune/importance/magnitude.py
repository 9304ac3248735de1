"""Coupled structures: which weights go together, and magnitude, the plainest score of them.

A KV group is coupled with its own queries, head h with group h // q; a neuron is its gate and up rows and down column.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy

AXES = ("n d", "k d", "f")  # of which coupled structures are made


def coupled(anatomy: Anatomy, terms: Callable[[str], Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give per layer the sums of `terms`, one number a weight of a named tensor, over heads [n] and neurons [f].

    float64, as `Scores` hold them. A head has its query rows and output columns and its share 1 / q of its group's keys
    and values, so that the heads of a group add up to the group. Biases of W_O and W_down belong to no structure.
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
        each = widths.heads // widths.groups
        heads.append(queries + keys.repeat_interleave(each) / each)
        neurons.append(totals["f"])
    return tuple(heads), tuple(neurons)


def magnitude(anatomy: Anatomy, source: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Give Σ |w| per layer, of heads [n] and of neurons [f]; no text is needed."""
    return coupled(anatomy, lambda name: source[name].abs())
