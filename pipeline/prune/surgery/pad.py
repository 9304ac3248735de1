"""Padding: layers widened with zero heads, KV groups and neurons, so that nothing they compute changes.

A padded query head, or a head of a padded group, meets zero columns of W_O; a padded neuron's gate and up rows are zero
and meets zero columns of W_down.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy, LayerSizes, Sizes
from pipeline.prune.head_norms import rescaled

Grid = tuple[int, ...]


def pad(anatomy: Anatomy, wide: Sizes, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint with every layer widened to `wide`, groups and heads of a group keeping their first places.

    Each layer needs at least as many groups, heads per group and neurons as it has. Gains that span all heads of a
    layer and what they normalise are rescaled, so that zeros change no mean square (`spans`).
    """
    places = {
        name.format(layer=layer): (name, layer) for name in anatomy.layer_tensors for layer in range(len(wide.layers))
    }
    for name, tensor in stream:
        if name in places:
            pattern, layer = places[name]
            narrow, wider = anatomy.sizes.layers[layer], wide.layers[layer]
            if narrow != wider:
                shares = {"n d": wider.heads / narrow.heads, "k d": wider.groups / narrow.groups}
                tensor = rescaled(anatomy, pattern, tensor, shares)
                tensor = _widened(anatomy, pattern, tensor, narrow, wider)
        yield name, tensor


def _widened(anatomy: Anatomy, pattern: str, tensor: Tensor, narrow: LayerSizes, wider: LayerSizes) -> Tensor:
    segments, sizes = anatomy.layer_tensors[pattern], anatomy.sizes
    grids = [[[_grid(axis, sizes, widths) for axis in segment] for widths in (narrow, wider)] for segment in segments]
    parts = tensor.split([math.prod(old[0]) for old, _ in grids])
    return torch.cat([_embedded(part, old, new) for part, (old, new) in zip(parts, grids)])


def _grid(axis: str, sizes: Sizes, widths: LayerSizes) -> Grid:
    """Give an axis of a layer as the grid its units lie in: query heads are [group, head of the group, head size]."""
    return {
        "h": (sizes.hidden,),
        "d": (sizes.head_size,),
        "f": (widths.neurons,),
        "k d": (widths.groups, sizes.head_size),
        "n d": (widths.groups, widths.heads // widths.groups, sizes.head_size),
    }[axis]


def _embedded(tensor: Tensor, old: list[Grid], new: list[Grid]) -> Tensor:
    """Give a tensor whose axes lie in the grids `old` in the low corner of zeros in the grids `new`."""
    zeros = tensor.new_zeros(sum(new, ()))
    zeros[tuple(slice(length) for length in sum(old, ()))] = tensor.reshape(sum(old, ()))
    return zeros.reshape([math.prod(grid) for grid in new])

