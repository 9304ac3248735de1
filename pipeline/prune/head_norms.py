"""Gains that span all heads of a layer (OLMo-2's norms of queries and keys) when some heads are zero.

Rows of zeros lower the mean square. With the other rows multiplied by s = sqrt(rows / rows that are not zero), and the
gain divided by s, such a norm returns what it returns over those rows only, whatever its epsilon.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.sizes import Axis

GAIN = "_norm.weight"


def spans(anatomy: Anatomy) -> dict[str, tuple[Axis, int]]:
    """Return the gains over all heads of a layer and the projections that write what they normalise, biases included.

    By name with a `{layer}` place: the axis, `n d` or `k d`, and the power of s that the tensor is multiplied by. Empty
    for a family that has no such gain.
    """
    result: dict[str, tuple[Axis, int]] = {}
    for gain, segments in anatomy.layer_tensors.items():
        if gain.endswith(GAIN) and segments in ((("n d",),), (("k d",),)):
            axis = segments[0][0]
            rows = (f"{gain.removesuffix(GAIN)}_proj.{kind}" for kind in ("weight", "bias"))
            result |= {name: (axis, 1) for name in rows if name in anatomy.layer_tensors} | {gain: (axis, -1)}
    return result


def rescaled(anatomy: Anatomy, pattern: str, tensor: Tensor, shares: Mapping[Axis, float]) -> Tensor:
    """Return a layer's tensor for a layer with `shares` times as many rows, by axis, the new rows zero.

    Tensors that no such gain concerns are returned unchanged.
    """
    spanned = spans(anatomy)
    if pattern not in spanned:
        return tensor
    axis, power = spanned[pattern]
    offset = anatomy.family.norm_offset if power < 0 else 0.0
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return ((exact + offset) * math.sqrt(shares[axis]) ** power - offset).to(tensor.dtype)


def alone(
    anatomy: Anatomy, layer: int, heads: Sequence[int] | Tensor, source: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield, by name, the tensors with which a layer's norms see some query heads and their KV groups only.

    The other rows are zero, so a layer whose W_O reads these heads only is the one that `cut` makes. Nothing is yielded
    where no gain spans heads, or no head is left. `source` maps a name to the whole layer's tensor.
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
