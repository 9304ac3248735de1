"""Padding: layers widened with zero heads, KV groups and neurons, so that nothing they compute changes.

A padded query head, or a head of a padded group, meets zero columns of W_O; a padded neuron's gate and up rows are zero
and meets zero columns of W_down.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy, LayerSizes, Segment, Sizes

Grid = tuple[int, ...]


def pad(anatomy: Anatomy, wide: Sizes, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint with every layer widened to `wide`, groups and heads of a group keeping their first places.

    Each layer needs at least as many groups, heads per group and neurons as it has. Where a gain spans all heads of a
    layer (a norm over the rows of W_Q or W_K), the rows are scaled by sqrt(wide / narrow) and the gain by its inverse:
    the zeros then change no mean square, whatever the norm's epsilon.
    """
    places = {
        name.format(layer=layer): (name, layer) for name in anatomy.layer_tensors for layer in range(len(wide.layers))
    }
    for name, tensor in stream:
        if name in places:
            pattern, layer = places[name]
            narrow, wider = anatomy.sizes.layers[layer], wide.layers[layer]
            if narrow != wider:
                tensor = _balanced(anatomy, pattern, tensor, narrow, wider)
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


def _balanced(anatomy: Anatomy, pattern: str, tensor: Tensor, narrow: LayerSizes, wider: LayerSizes) -> Tensor:
    """Scale the rows that a gain over all heads normalises, and the gain inversely; other tensors as they are."""
    unit, _, kind = pattern.rpartition(".")
    gain = unit.removesuffix("_proj").removesuffix("_norm") + "_norm.weight"
    spans: Segment = anatomy.layer_tensors.get(gain, (("d",),))[0]
    if not unit.endswith(("_proj", "_norm")) or spans == ("d",):
        return tensor
    grown = wider.heads / narrow.heads if spans == ("n d",) else wider.groups / narrow.groups
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if pattern == gain:
        offset = anatomy.family.norm_offset
        return ((exact + offset) / math.sqrt(grown) - offset).to(tensor.dtype)
    return (exact * math.sqrt(grown)).to(tensor.dtype)
