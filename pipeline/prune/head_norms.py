"""Gains that span all heads of a layer (OLMo-2's norms of queries and keys), where some heads are only zeros.

Rows of zeros would lower the mean square. With the other rows times s = sqrt(rows / rows that are not zero), and the
gain over s, such a norm gives what it would over those rows alone, whatever its epsilon.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy, Axis

GAIN = "_norm.weight"


def spans(anatomy: Anatomy) -> dict[str, tuple[Axis, int]]:
    """Give the gains over all heads of a layer and the projections that write what they normalise, biases too.

    By name with a `{layer}` place: the axis, `n d` or `k d`, and the power of s that the tensor is multiplied by. Empty
    for a family that has no such gain.
    """
    found = {}
    for gain, ((axis, *_), *_) in anatomy.layer_tensors.items():
        if gain.endswith(GAIN) and axis in ("n d", "k d"):
            rows = (f"{gain.removesuffix(GAIN)}_proj.{kind}" for kind in ("weight", "bias"))
            found |= {name: (axis, 1) for name in rows if name in anatomy.layer_tensors} | {gain: (axis, -1)}
    return found


def rescaled(anatomy: Anatomy, pattern: str, tensor: Tensor, shares: Mapping[Axis, float]) -> Tensor:
    """Give a layer's tensor for a layer of `shares` times as many rows, by axis, the others zero; most as they are."""
    if pattern not in (found := spans(anatomy)):
        return tensor
    axis, power = found[pattern]
    offset = anatomy.family.norm_offset if power < 0 else 0.0
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return ((exact + offset) * math.sqrt(shares[axis]) ** power - offset).to(tensor.dtype)


def alone(
    anatomy: Anatomy, layer: int, heads: Sequence[int] | Tensor, source: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield, by name, what a layer's norms need to see some query heads and their KV groups alone; the others are zero.

    So a layer whose W_O reads these heads alone is the one that `cut` makes. Nothing is yielded where no gain spans
    heads, or no head is left; `source` gives the whole layer's tensors by name.
    """
    own, size = anatomy.sizes.layers[layer], anatomy.sizes.head_size
    there = torch.zeros(own.groups, own.heads // own.groups, dtype=torch.bool)
    there.view(-1)[torch.as_tensor(heads, dtype=torch.int64, device=there.device)] = True
    if not there.any():
        return
    kept = {"n d": there.flatten(), "k d": there.any(1)}
    shares = {axis: len(units) / int(units.sum()) for axis, units in kept.items()}
    for pattern, (axis, _) in spans(anatomy).items():
        whole = source(name := pattern.format(layer=layer))
        narrow = rescaled(anatomy, pattern, whole, shares).clone()
        narrow[~kept[axis].repeat_interleave(size).to(narrow.device)] = 0.0
        yield name, narrow
