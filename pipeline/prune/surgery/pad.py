"""Padding: layers widened with zero heads, KV groups and neurons, so that nothing they compute changes.

A padded query head, or a head of a padded group, is multiplied by zero columns of W_O; a padded neuron by zero columns
of W_down.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.sizes import Axis, LayerSizes, Sizes, joint
from pipeline.prune.head_norms import rescaled

Grid = tuple[int, ...]


def pad(anatomy: Anatomy, wide: Sizes, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint with every layer widened to `wide`, groups and heads of a group keeping their first places.

    `wide` has at least the groups, heads per group and neurons of every layer. Gains that span all heads of a layer and
    what they normalise are rescaled, so that zeros change no mean square (`spans`). An attention or FFN that was
    removed is zero throughout.
    """
    missing = anatomy.narrowed(wide, anatomy.layer_types).shapes()
    places = {
        name.format(layer=layer): (name, layer) for name in anatomy.layer_tensors for layer in range(len(wide.layers))
    }
    for name, tensor in stream:
        missing.pop(name, None)
        kind = tensor.dtype
        if name in places:
            pattern, layer = places[name]
            narrow, wider = anatomy.sizes.layers[layer], wide.layers[layer]
            if narrow != wider:
                few, many = (max(1, narrow.heads), max(1, narrow.groups))  # none: no tensor of the axis is left
                shares = {"n d": wider.heads / few, "k d": wider.groups / many}
                tensor = rescaled(anatomy, pattern, tensor, shares)
                tensor = _widened(anatomy, pattern, tensor, layer, narrow, wider)
        yield name, tensor
    for name, shape in missing.items():
        yield name, torch.zeros(shape, dtype=kind)


def _widened(
    anatomy: Anatomy, pattern: str, tensor: Tensor, layer: int, narrow: LayerSizes, wider: LayerSizes
) -> Tensor:
    segments, sizes = anatomy.layer_tensors[pattern], anatomy.sizes
    both = (narrow, wider)
    grids = [[[_grid(axis, sizes, layer, widths) for axis in segment] for widths in both] for segment in segments]
    along = joint(segments)
    if not segments[0]:
        return tensor
    parts = tensor.split([math.prod(old[along]) for old, _ in grids], along)
    return torch.cat([_embedded(part, old, new) for part, (old, new) in zip(parts, grids)], along)


def _grid(axis: Axis, sizes: Sizes, layer: int, widths: LayerSizes) -> Grid:
    """Return the lengths of an axis' letters: query heads are [group, head of the group]."""
    if "q+2" in axis and widths.heads != widths.groups:
        raise ValueError("export.form is padded: query heads, keys and values share rows by group; set export.form=own")
    lengths = {
        "h": (sizes.hidden,),
        "d": (sizes.head_size,),
        "f": (widths.neurons,),
        "k": (widths.groups,),
        "n": (widths.groups, widths.each),
        "q+2": (widths.each + 2,),
    }
    lengths |= {letter: (length,) for letter, length in sizes.carried.items()}
    lengths |= {letter: (own[layer],) for letter, own in sizes.by_layer.items()}
    return sum(((int(letter),) if letter.isdigit() else lengths[letter] for letter in axis.split()), ())


def _embedded(tensor: Tensor, old: list[Grid], new: list[Grid]) -> Tensor:
    """Return zeros of the grids `new` with a tensor of the grids `old` in their low corner."""
    zeros = tensor.new_zeros(sum(new, ()))
    zeros[tuple(slice(length) for length in sum(old, ()))] = tensor.reshape(sum(old, ()))
    return zeros.reshape([math.prod(grid) for grid in new])
